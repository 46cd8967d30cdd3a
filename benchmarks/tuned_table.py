"""Plans against uniform WINA top-k at equal realized sparsity, on several texts.

    python benchmarks/tuned_table.py --calibration CALIB --plan TUNED50 --plan TUNED65 \
        --text wikitext2-test.txt --text topics.txt --text piqa.txt

The gap ratio is (ppl - dense) / (uniform WINA - dense), uniform WINA's perplexity interpolated
log-linearly to the plan's realized sparsity from 25, 40, 50 and 65 % (and 70 % as upper end).
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Annotated

import typer

from wina.calibration import Calibration, make_plan
from wina.evaluation import evaluate
from wina.models import load_model
from wina.plan import Plan

GRID = (0.25, 0.4, 0.5, 0.65, 0.7)


def interpolated(points: list[tuple[float, float]], sparsity: float) -> float:
    """Return the perplexity at ``sparsity``, log-linear between the two nearest points."""
    points = sorted(points)
    pairs = list(itertools.pairwise(points))
    (s0, p0), (s1, p1) = next((p for p in pairs if sparsity <= p[1][0]), pairs[-1])
    part = (sparsity - s0) / (s1 - s0)
    return math.exp(math.log(p0) * (1 - part) + math.log(p1) * part)


def main(
    calibration: Annotated[Path, typer.Option()],
    plan: Annotated[list[str], typer.Option()],
    text: Annotated[list[Path], typer.Option()],
    model: str = "demo",
    tokens: int = 81_920,
    context: int = 2_048,
    dense_prefix: int = 20,
    device: str = "auto",
    grid: str = ",".join(map(str, GRID)),
    json_to: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Score every plan on every text, print a Markdown table."""
    loaded = load_model(model, dtype="float32", device=device)
    found = Calibration.load(calibration)
    plans = [Plan.load(one) for one in plan]
    for one in plans:
        # Evaluated in float32 whatever dtype the plan was tuned in: the weights are the same.
        one.document.model.check(found.document.model)
    points = [float(part) for part in grid.split(",")]
    baseline = [make_plan(found, s, "wina", "uniform", "topk") for s in points]
    print(
        "| text | plan | target | sparsity | dense | uniform WINA | perplexity | KL | gap ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    records = []
    for path in text:
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            [*baseline, *plans],
            [path],
            name=loaded.name,
            tokens=tokens,
            context=context,
            dense_prefix=dense_prefix,
        )
        records.append(result.model_dump())
        dense = result.dense.perplexity
        curve = [(row.sparsity, row.perplexity) for row in result.results[: len(points)]]
        for name, row in zip(plan, result.results[len(points) :], strict=True):
            uniform = interpolated(curve, row.sparsity)
            ratio = (row.perplexity - dense) / (uniform - dense)
            print(
                f"| {path.name} | {Path(name).name} | {row.target_sparsity:.0%} "
                f"| {row.sparsity:.3f} | {dense:.2f} | {uniform:.2f} | {row.perplexity:.2f} "
                f"| {row.kl:.4f} | {ratio:.3f} |",
                flush=True,
            )
        if json_to is not None:
            json_to.write_text(json.dumps(records, indent=1))
    print(f"\n{result.model}, {result.dtype} on {result.device}, {json.dumps(result.versions)}")


if __name__ == "__main__":
    typer.run(main)
