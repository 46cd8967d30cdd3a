"""The table of methods, allocations and selections on one model and two texts.

    python benchmarks/quality_table.py --calibration-text wikitext2-valid.txt \
        --text wikitext2-test.txt

It takes minutes on a GPU and hours on two CPU cores; there, pass --tokens 8192
--calibration-tokens 8192.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from wina.calibration import Calibration, CalibrationSettings, FileText, calibrate, make_plan
from wina.evaluation import evaluate
from wina.models import load_model
from wina.plan import Plan

ALL = (0.25, 0.4, 0.5, 0.65)
# (method, allocation, selection): sparsities
RECIPES = {
    ("teal", "uniform", "topk"): ALL,
    ("wina", "uniform", "topk"): ALL,
    ("wina-kgate", "uniform", "topk"): ALL,
    ("teal", "global", "threshold"): ALL,
    ("wina", "global", "threshold"): ALL,
    ("loss", "global", "threshold"): ALL,
    ("wina", "uniform", "threshold"): ALL,
    ("teal", "greedy", "topk"): (0.5,),
    ("wina", "greedy", "topk"): (0.5,),
}


def main(
    calibration_text: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    model: str = "demo",
    calibration_tokens: int = 65_536,
    tokens: int = 81_920,
    context: int = 2_048,
    dense_prefix: int = 20,
    device: str = "auto",
    dtype: str = "float32",
    only: Annotated[str, typer.Option(help="Sparsities, separated by commas.")] = "",
    recipe: Annotated[
        list[str] | None, typer.Option(help="method/allocation/selection; all if omitted.")
    ] = None,
    json_to: Annotated[Path | None, typer.Option("--json")] = None,
    calibration_to: Annotated[Path | None, typer.Option(help="Keep the calibration.")] = None,
) -> None:
    """Calibrate once, score every recipe, print a Markdown table."""
    begin = time.perf_counter()
    loaded = load_model(model, dtype=dtype, device=device)
    settings = CalibrationSettings(
        tokens=calibration_tokens, context=context, dense_prefix=dense_prefix
    )
    if calibration_to is not None and calibration_to.is_dir():
        calibration = Calibration.load(calibration_to)
    else:
        calibration = calibrate(
            loaded.model,
            loaded.tokenizer,
            FileText((calibration_text,)),
            settings,
            name=loaded.name,
            output=calibration_to,
        )
    calibrated = time.perf_counter()
    wanted = {float(part) for part in only.split(",")} if only else None
    print(f"calibration {calibrated - begin:.0f} s; {calibration.document.verdict}", flush=True)

    def plans(method: str, allocation: str, selection: str) -> Iterator[Plan]:
        for sparsity in RECIPES[method, allocation, selection]:
            if wanted is None or sparsity in wanted:
                yield make_plan(
                    calibration,
                    sparsity,
                    method,
                    allocation,
                    selection,
                    model=loaded.model,
                    refine=allocation != "greedy",
                )

    print("| method | allocation | selection | target | sparsity | perplexity | KL | agreement |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    results = []
    for row_recipe in RECIPES:
        if recipe and "/".join(row_recipe) not in recipe:
            continue
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            plans(*row_recipe),
            [text],
            name=loaded.name,
            tokens=tokens,
            context=context,
            dense_prefix=dense_prefix,
        )
        if not results:
            print(f"| dense | | | | | {result.dense.perplexity:.2f} | | |")
        results.append(result.model_dump())
        if json_to is not None:
            json_to.write_text(json.dumps(results, indent=1))
        for row in result.results:
            print(
                f"| {row.method} | {row.allocation} | {row.selection} "
                f"| {row.target_sparsity:.0%} | {row.sparsity:.3f} | {row.perplexity:.2f} "
                f"| {row.kl:.4f} | {row.top1_agreement:.3f} |",
                flush=True,
            )
    print(
        f"\n{result.model}, {result.scored_positions} positions of {text.name}, {result.dtype} on "
        f"{result.device}, {json.dumps(result.versions)}; scoring "
        f"{time.perf_counter() - calibrated:.0f} s"
    )


if __name__ == "__main__":
    typer.run(main)
