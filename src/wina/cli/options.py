"""Options that several commands share, and what they turn into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import to_json

from wina.cache import cached_plan
from wina.calibration import Calibration, CalibrationSettings, make_plan
from wina.criteria import criteria
from wina.errors import UsageError
from wina.generation import Mode
from wina.models import LoadedModel, load_model
from wina.plan import Plan
from wina.progress import note
from wina.selection import check_selection, check_sparsity

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hub id, folder or GGUF file; the embedded SmolLM2-135M-Instruct if omitted.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto is CUDA if there.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(help="Of sampling and of the model's own text.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Sparsity = Annotated[float, typer.Option(help="Share of weights not touched, in [0, 1).")]
Method = Annotated[str, typer.Option(help="Criterion: wina, wina-kgate, teal, loss.")]
Allocation = Annotated[
    str | None,
    typer.Option(help="uniform, global or greedy; omitted: what calibration found better."),
]
Selection = Annotated[str, typer.Option(help="threshold (what kernels run) or topk.")]
IncludeHead = Annotated[bool, typer.Option("--include-head", help="Sparsify lm_head too.")]
PlanSource = Annotated[str | None, typer.Option("--plan", help="A plan's folder or hub id.")]
CalibrationFolder = Annotated[
    Path | None, typer.Option("--calibration", help="A folder made by wina calibrate.")
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the decode step; by default on CUDA only, since it takes half a minute.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Of a hub model.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


def load(
    model: str | None, dtype: str, device: str, revision: str | None, trust_remote_code: bool
) -> LoadedModel:
    """Load the model that the options name, saying so."""
    note(f"loading {model or 'the embedded model'}")
    return load_model(
        model,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def check_request(sparsity: float, method: str, allocation: str | None, selection: str) -> None:
    """Raise UsageError for a bad request before anything long starts."""
    check_sparsity(sparsity)
    criteria.get(method)
    check_selection(selection)
    if allocation not in (None, "greedy"):
        from wina.allocation import allocations

        allocations.get(allocation, also=("greedy",))


def find_plan(
    loaded: LoadedModel,
    plan: Plan | None,
    calibration: Calibration | None,
    sparsity: float,
    method: str,
    allocation: str | None,
    selection: str,
    include_head: bool,
    seed: int,
) -> Plan:
    """Return the given plan, or one from the given calibration, or from the cache."""
    if plan is not None:
        return plan
    if calibration is not None:
        return make_plan(
            calibration,
            sparsity,
            method,
            allocation,
            selection,
            include_head=include_head,
            model=loaded.model,
            refine=True,
        )
    settings = quick_settings(loaded, seed)
    return cached_plan(loaded, settings, sparsity, method, allocation, selection, include_head)


def quick_settings(loaded: LoadedModel, seed: int) -> CalibrationSettings:
    """Return settings for a calibration on the way: small where there is no GPU.

    With the held-out eighth they make whole batches of the model's own text.
    """
    tokens = 14_336 if loaded.model.device.type == "cuda" else 3_584
    return CalibrationSettings(tokens=tokens, seed=seed)


def load_artifacts(
    plan: str | None, calibration: Path | None
) -> tuple[Plan | None, Calibration | None]:
    """Read the plan or the calibration that the options name; not both."""
    if plan is not None and calibration is not None:
        raise UsageError("give --plan or --calibration, not both")
    return (
        None if plan is None else Plan.load(plan),
        None if calibration is None else Calibration.load(calibration),
    )


def decode_mode(compile_step: bool | None) -> Mode:
    """Return the decoder's mode for --compile, --no-compile or neither."""
    return "auto" if compile_step is None else "compiled" if compile_step else "eager"


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on standard output; what is not finite becomes null."""
    typer.echo(to_json(content, inf_nan_mode="null").decode())
