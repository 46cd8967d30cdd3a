"""A task's scores, dense and under plans, as a Markdown table with paired differences.

    python benchmarks/piqa_table.py plans --task-data data --device cuda

``plans`` is a folder of plans, or one plan; more rows can be made from a calibration:

    python benchmarks/piqa_table.py plans --task-data data --calibration calibration \
        --recipe teal/uniform --recipe wina/uniform --recipe loss/global --sparsities 0.25,0.4,0.5

Interrupted and started again, it goes on where it was (answers are kept in wina's cache).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from wina.calibration import Calibration, make_plan
from wina.errors import UsageError
from wina.evaluation.tasks import TasksEvaluation, TasksResult, check_tasks, evaluate_tasks
from wina.models import identify, load_model
from wina.plan import Plan
from wina.plan.plan import DOCUMENT

HEADER = "| target | plan | sparsity | {metric} | minus dense | answers changed |"


def plans_in(folder: Path) -> list[tuple[str, Plan]]:
    """Return the plans in a folder, by name, sparser ones last; or the plan that it is."""
    paths = sorted(path.parent for path in folder.glob(f"**/{DOCUMENT}"))
    if not paths:
        raise UsageError(f"there is no plan in {folder}")
    found = []
    for path in paths:
        plan = Plan.load(str(path))
        name = folder.name if path == folder else path.relative_to(folder).as_posix()
        found.append((f"{plan.document.method} ({name})", plan))
    return sorted(found, key=lambda pair: pair[1].document.target_sparsity)


def row(name: str, one: TasksResult, task: str, metric: str) -> str:
    """Return a row of the table; percent, with one standard error."""
    score = one.tasks[task].metrics[f"{metric},none"]
    value = f"{100 * score.value:.1f}"
    if score.stderr is not None:
        value += f" ± {100 * score.stderr:.1f}"
    if one.sparsity is None:
        return f"| | dense | | {value} | | |"
    against = ""
    if score.difference is not None and score.difference_stderr is not None:
        against = f"{100 * score.difference:+.1f} ± {100 * score.difference_stderr:.1f}"
    changed = "" if score.changed is None else f"{100 * score.changed:.1f} %"
    return (
        f"| {one.target_sparsity:.0%} | {name} | {100 * one.sparsity:.1f} % | {value} | {against} "
        f"| {changed} |"
    )


def table(names: list[str], result: TasksEvaluation, metric: str) -> str:
    """Return a table for each task."""
    lines = []
    for task, score in result.dense.tasks.items():
        lines += [f"{task}, {score.count} questions", "", HEADER.format(metric=metric)]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [row("", result.dense, task, metric)]
        pairs = zip(names, result.results, strict=True)
        lines += [row(name, one, task, metric) for name, one in pairs if task in one.tasks]
        lines += [""]
    return "\n".join(lines)


def main(
    plans: Annotated[Path | None, typer.Argument(help="Folder of plans.")] = None,
    task_data: Annotated[Path | None, typer.Option()] = None,
    tasks: str = "piqa",
    metric: str = "acc_norm",
    model: str = "demo",
    calibration: Annotated[Path | None, typer.Option()] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="method/allocation.")] = None,
    sparsities: str = "0.25,0.4,0.5",
    device: str = "auto",
    dtype: str = "bfloat16",
    batch_size: int = 32,
    limit: int | None = None,
    json_to: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Score the dense model and each plan, print Markdown."""
    found_tasks = check_tasks(tasks.split(","), task_data)
    found = [] if plans is None else plans_in(plans)
    loaded = load_model(model, dtype=dtype, device=device)
    identity = identify(loaded.model, loaded.name)
    if calibration is not None:
        statistics = Calibration.load(calibration)
        for one in recipe or ["loss/global"]:
            method, _, allocation = one.partition("/")
            for target in map(float, sparsities.split(",")):
                made = make_plan(statistics, target, method, allocation or None)
                found.append((f"{method}, {made.document.allocation}", made))
    for _, plan in found:
        plan.document.model.check(identity)
    found.sort(key=lambda pair: pair[1].document.target_sparsity)
    result = evaluate_tasks(
        loaded.model,
        loaded.tokenizer,
        [plan for _, plan in found],
        found_tasks,
        name=loaded.name,
        limit=limit,
        batch_size=batch_size,
    )
    names = [name for name, _ in found]
    if json_to is not None:
        content = {"names": names, **result.model_dump(mode="json")}
        json_to.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(table(names, result, metric))
    print(
        f"{result.model}, {result.dtype} on {result.device}, batches of {batch_size}, "
        f"{json.dumps(result.versions)}; {result.scoring}"
    )
    for task, error in result.failures.items():
        print(f"FAILED {task}: {error}")


if __name__ == "__main__":
    typer.run(main)
