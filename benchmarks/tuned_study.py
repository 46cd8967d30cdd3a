"""Tuned plans over texts, sparsities and seeds, and what they lose: the table of docs/results.md.

    python benchmarks/tuned_study.py tune study --text wikitext2-valid.txt \
        --run text+self:0.5:0 --run text+self+docs:0.5:0 --run self:0.5:0
    python benchmarks/tuned_study.py score study --text wikitext2-test.txt --text topics.txt

A run is TEXT:SPARSITY:SEED. It is calibrated and tuned on equal parts of one or more of --text
(``text``), what the model writes itself (``self``, always there) and docstrings of Python's library
(``docs``), joined by a plus sign. What is there already is not made again, and
``score --plans 9 --wait SECONDS`` scores plans beside ``tune``s that are still making them.

The gap ratio is (ppl - dense) / (uniform WINA - dense), uniform WINA top-k's perplexity
interpolated log-linearly to the plan's realized sparsity.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wina.allocation.build import versions
from wina.calibration import Calibration, CalibrationSettings, calibrate, make_plan
from wina.calibration.text import DocsText, FileText, MixedText, SelfText, TextSource
from wina.evaluation import evaluate
from wina.files import write_text
from wina.models import load_model
from wina.plan import Plan
from wina.tuning import default_settings, tuned_plan

app = typer.Typer(add_completion=False)
BATCH = {"cuda": {"batch": 256, "length": 512}, "cpu": {}}


@dataclass(frozen=True)
class Written:
    """Text that was written before, as token ids."""

    name: str
    ids: NDArray
    resumable = False

    def describe(self) -> str:
        return self.name

    def pieces(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: list, first: int
    ) -> Iterator[Sequence[int]]:
        del model, tokenizer, start, first
        yield self.ids.tolist()


@app.command()
def tune(
    folder: Path,
    run: Annotated[list[str], typer.Option()],
    text: Annotated[list[Path] | None, typer.Option()] = None,
    model: str = "demo",
    tokens: Annotated[int, typer.Option(help="Of the model's own text.")] = 253_952,
    statistics_tokens: int = 16_384,
    context: int = 2_048,
    steps: int | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
) -> None:
    """Calibrate and tune."""
    loaded = load_model(model, dtype=dtype, device=device)
    kind = loaded.model.device.type
    settings = CalibrationSettings(
        tokens=tokens, statistics_tokens=statistics_tokens, context=context
    )
    options = default_settings(kind)
    if steps is not None:
        options = replace(options, steps=steps)

    def calibration(name: str) -> Calibration:
        path = folder / f"calibration-{name}"
        if path.exists():
            return Calibration.load(path)
        begin = time.perf_counter()
        source: TextSource = SelfText(seed=0, **BATCH[kind])
        parts = name.split("+")
        size = replace(settings, tokens=len(parts) * tokens)
        if len(parts) > 1:
            own = calibration("self")
            written = Written(own.document.source, own.tokens[: own.document.tokens])
            known = {"text": FileText(tuple(text or [])), "self": written, "docs": DocsText()}
            source = MixedText(tuple(known[part] for part in parts))
        made = calibrate(
            loaded.model, loaded.tokenizer, source, size, name=loaded.name, output=path
        )
        print(f"{name}: calibrated in {time.perf_counter() - begin:.1f} s", flush=True)
        print(made.document.verdict, flush=True)
        return made

    for one in run:
        name, sparsity, seed = one.split(":")
        if not {"self"} <= set(name.split("+")) <= {"text", "self", "docs"}:
            raise typer.BadParameter(f"{name!r} is not of text, self and docs, with self")
        path = folder / "plans" / one.replace(":", "-")
        if path.exists():
            continue
        found = calibration(name)
        begin = time.perf_counter()
        plan = tuned_plan(
            found,
            loaded.model,
            float(sparsity),
            settings=replace(options, seed=int(seed)),
            output=path,
        )
        plan.save(path)
        print(f"{one}: tuned in {time.perf_counter() - begin:.1f} s", flush=True)


@app.command()
def score(
    folder: Path,
    text: Annotated[list[Path], typer.Option()],
    model: str = "demo",
    tokens: int = 40_960,
    context: int = 2_048,
    dense_prefix: int = 20,
    grid: str = "0.45,0.5,0.55,0.62,0.66,0.7",
    plans: Annotated[int, typer.Option(help="Plans to wait for.")] = 0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for them.")] = 0.0,
    device: str = "auto",
) -> None:
    """Score uniform WINA top-k, untuned plans and the tuned ones; print a Markdown table."""
    deadline = time.monotonic() + wait
    while not (path := _any_calibration(folder)) and time.monotonic() < deadline:
        time.sleep(1)
    assert path is not None, "tune first"
    found = Calibration.load(path)
    loaded = load_model(model, dtype="float32", device=device)
    records: dict[str, dict[str, dict]] = {}
    points = [float(part) for part in grid.split(",")]

    def add(name: str, plan: Plan) -> None:
        records[name] = {}
        for one in text:
            result = evaluate(
                loaded.model,
                loaded.tokenizer,
                [plan],
                [one],
                name=loaded.name,
                tokens=tokens,
                context=context,
                dense_prefix=dense_prefix,
            )
            row = result.results[0]
            records[name][one.name] = {
                "dense": result.dense.perplexity,
                "sparsity": row.sparsity,
                "perplexity": row.perplexity,
                "kl": row.kl,
            }
        write_text(folder / "scores.json", json.dumps(records, indent=1))
        print(name, json.dumps(records[name]), flush=True)

    for point in points:
        add(f"uniform-{point}", make_plan(found, point, "wina", "uniform", "topk"))
    add("loss-0.5", make_plan(found, 0.5, "loss", model=loaded.model, refine=True))
    scored: set[str] = set()
    while True:
        for plan in sorted((folder / "plans").glob("*/plan.json")):
            if plan.parent.name not in scored:
                add(plan.parent.name, Plan.load(plan.parent))
                scored.add(plan.parent.name)
        if len(scored) >= plans or time.monotonic() > deadline:
            break
        time.sleep(1)
    where = torch.cuda.get_device_name() if loaded.model.device.type == "cuda" else "cpu"
    print(f"\n{loaded.name}, float32 on {where}, {json.dumps(versions())}\n")
    print_table(records)


def _any_calibration(folder: Path) -> Path | None:
    found = sorted(folder.glob("calibration-*/calibration.json"))
    return found[0].parent if found else None


def interpolated(points: list[tuple[float, float]], sparsity: float) -> float:
    """Return the perplexity at ``sparsity``, log-linear between the two nearest points."""
    pairs = list(itertools.pairwise(sorted(points)))
    (s0, p0), (s1, p1) = next((p for p in pairs if sparsity <= p[1][0]), pairs[-1])
    part = (sparsity - s0) / (s1 - s0)
    return math.exp(math.log(p0) * (1 - part) + math.log(p1) * part)


def print_table(records: dict[str, dict[str, dict]]) -> None:
    """Print gap ratios by plan and text."""
    print("| plan | text | sparsity | dense | uniform WINA | perplexity | KL | gap ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    uniform = [rows for name, rows in records.items() if name.startswith("uniform-")]
    for name, rows in records.items():
        if name.startswith("uniform-"):
            continue
        for text, row in rows.items():
            curve = [(one[text]["sparsity"], one[text]["perplexity"]) for one in uniform]
            base = interpolated(curve, row["sparsity"])
            ratio = (row["perplexity"] - row["dense"]) / (base - row["dense"])
            print(
                f"| {name} | {text} | {row['sparsity']:.3f} | {row['dense']:.2f} | {base:.2f} "
                f"| {row['perplexity']:.2f} | {row['kl']:.4f} | {ratio:.3f} |"
            )


if __name__ == "__main__":
    app()
