"""`wina calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wina.calibration import (
    CalibrationSettings,
    DatasetText,
    DocsText,
    FileText,
    MixedText,
    SelfText,
    TextSource,
    default_text,
)
from wina.calibration import calibrate as run_calibration
from wina.calibration.artifact import DOCUMENT
from wina.cli import options
from wina.errors import UsageError
from wina.files import check_replaceable
from wina.models.loading import resolve_device
from wina.progress import note

GPU_BATCH = {"batch": 256, "length": 512}  # of the model's own text: a GPU wants more at once


def calibrate(
    model: options.Model = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path(
        "calibration"
    ),
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text file; may be repeated.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub dataset with a text column.")] = None,
    self_text: Annotated[
        bool,
        typer.Option("--self", help="Text that the model writes itself; also beside --text."),
    ] = False,
    docs: Annotated[
        bool,
        typer.Option("--docs", help="Docstrings of Python's standard library; also beside --text."),
    ] = False,
    tokens: Annotated[int, typer.Option(help="Of calibration text.")] = 16_384,
    context: Annotated[int, typer.Option(help="Positions of a window.")] = 2_048,
    dense_prefix: Annotated[int, typer.Option(help="First positions not counted.")] = 20,
    gradient: Annotated[
        bool, typer.Option(help="Collect gradients too, for 'loss' and 'global'.")
    ] = True,
    verdict: Annotated[
        bool, typer.Option(help="Measure uniform against global allocation at 50 %.")
    ] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Collect a model's statistics, from which plans for any sparsity follow.

    Without any text given it is what the model writes itself and Python's docstrings. Work is
    saved as it goes: started again after an interruption, it goes on.

    Examples:
        wina calibrate demo -o calibration

        wina calibrate HuggingFaceTB/SmolLM2-360M --text corpus.txt --tokens 65536 -o calibration

        wina calibrate demo --text corpus.txt --self --docs --tokens 524288 -o for-tuning
    """
    if text and dataset is not None:
        raise UsageError("give --text or --dataset, not both")
    settings = CalibrationSettings(
        tokens=tokens,
        context=context,
        dense_prefix=dense_prefix,
        seed=seed,
        gradient=gradient,
        verdict=verdict,
    )
    sources: list[TextSource] = []
    if text:
        sources.append(FileText(tuple(text)))
    if dataset is not None:
        sources.append(DatasetText(dataset))
    size = GPU_BATCH if resolve_device(device).type == "cuda" else {}
    if not sources and self_text == docs:
        sources.append(default_text(seed, **size))
    else:
        sources += [SelfText(seed=seed, **size)] if self_text else []
        sources += [DocsText()] if docs else []
    source = sources[0] if len(sources) == 1 else MixedText(tuple(sources))
    check_replaceable(output, DOCUMENT)
    loaded = options.load(model, dtype, device, revision, trust_remote_code, quantize)
    calibration = run_calibration(
        loaded.model,
        loaded.tokenizer,
        source,
        settings,
        name=loaded.name,
        revision=loaded.revision,
        output=output,
    )
    document = calibration.document
    if as_json:
        options.print_json({"calibration": str(output), **document.model_dump(mode="json")})
        return
    note(f"{document.tokens} tokens of {loaded.name} -> {output}", style="none")
    if document.verdict is not None:
        found = ", ".join(f"{name} {kl:.4f}" for name, kl in document.verdict.kl.items())
        note(f"held-out KL at 50 %: {found} nats a token -> {document.verdict.best}", style="none")
