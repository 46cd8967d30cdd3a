"""Two runs side by side: reports, or what ``wina eval --json`` printed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from wina.bench import BenchReport
from wina.errors import UsageError, WinaError
from wina.evaluation import Evaluation
from wina.evaluation.quality import SparseResult
from wina.evaluation.tasks import TasksEvaluation, TasksResult, fill_differences
from wina.files import validate
from wina.report.document import Report

Key = tuple[str, str, str, float]  # method, allocation, selection, target sparsity


class Run(BaseModel):
    """What a file says of one run; any part may be missing."""

    source: str
    model: str
    quality: Evaluation | None = None
    tasks: TasksEvaluation | None = None
    speed: BenchReport | None = None


class Change(BaseModel):
    """A number in both runs.

    Attributes:
        first: None if the first run has none; so with ``second``.
        difference: second minus first; paired where ``stderr`` is given.
        stderr: standard error of the difference, windows or questions paired; None if the two
            runs did not score the same ones, or there is but one.
    """

    name: str
    first: float | None
    second: float | None
    difference: float | None = None
    stderr: float | None = None


class PlanChanges(BaseModel):
    """All numbers of the plans that agree in method, allocation, selection and target."""

    plan: str
    changes: list[Change]


class Comparison(BaseModel):
    """Two runs: what was set otherwise, and how far the results are apart."""

    first: str
    second: str
    settings: dict[str, tuple[str, str]]
    plans: list[PlanChanges]


def read_run(path: Path) -> Run:
    """Read a report's JSON file, or the output of ``wina eval --json``.

    Raises:
        UsageError: there is no such file.
        WinaError: it is neither.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {str(path)!r}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WinaError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        content = {}
    if content.get("kind") == "wina report":
        report = validate(content, Report, str(path))
        parts = {"quality": report.quality, "tasks": report.tasks, "speed": report.speed}
        return Run(source=str(path), model=report.model, **parts)  # type: ignore[arg-type]
    tasks = content.pop("tasks", None)
    if tasks is None and "dense" not in content:
        raise WinaError(f"{path} is neither a report's JSON nor that of wina eval")
    quality = validate(content, Evaluation, str(path)) if "dense" in content else None
    scores = None if tasks is None else validate(tasks, TasksEvaluation, str(path))
    found = quality or scores
    assert found is not None
    return Run(source=str(path), model=found.model, quality=quality, tasks=scores)


def compare_runs(first: Run, second: Run) -> Comparison:
    """Compare two runs, window by window and question by question where they scored the same."""
    rows = [_quality_rows(run) for run in (first, second)]
    tasks = [_task_rows(run) for run in (first, second)]
    keys = list(dict.fromkeys([*rows[0], *rows[1], *tasks[0], *tasks[1]]))
    same_text = _same_text(first, second)
    found = [PlanChanges(plan="dense", changes=_dense(first, second))]
    for key in keys:
        changes = _quality(rows[0].get(key), rows[1].get(key), same_text)
        changes += _speeds(first, second, key)
        changes += _tasks(tasks[0].get(key), tasks[1].get(key))
        found.append(PlanChanges(plan=_name(key), changes=changes))
    return Comparison(
        first=first.source,
        second=second.source,
        settings=_settings(first, second),
        plans=[x for x in found if x.changes],
    )


def _settings(first: Run, second: Run) -> dict[str, tuple[str, str]]:
    """Return what was set otherwise in the two runs."""
    facts = [_facts(run) for run in (first, second)]
    names = dict.fromkeys([*facts[0], *facts[1]])
    pairs = {name: (facts[0].get(name, "—"), facts[1].get(name, "—")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _facts(run: Run) -> dict[str, str]:
    found: dict[str, Any] = {"model": run.model}
    if run.quality is not None:
        names = ("text", "scored_positions", "context", "dense_prefix", "start", "device", "dtype")
        found |= {name: getattr(run.quality, name) for name in names}
        found |= run.quality.versions
    if run.tasks is not None:
        found |= {"questions, at most": run.tasks.limit, "scoring": run.tasks.scoring}
        found |= {"dtype": run.tasks.dtype, "device": run.tasks.device, **run.tasks.versions}
    if run.speed is not None:
        found |= {"threads": run.speed.threads, "timed context": run.speed.context}
    return {name: str(value) for name, value in found.items()}


def _key(row: SparseResult | TasksResult) -> Key:
    return row.method, row.allocation or "", row.selection or "", row.target_sparsity


def _name(key: Key) -> str:
    method, allocation, selection, target = key
    parts = [method, *([allocation] if allocation != method else []), selection]
    return f"{', '.join(parts)}, {target:.0%}"


def _quality_rows(run: Run) -> dict[Key, SparseResult]:
    return {} if run.quality is None else {_key(row): row for row in run.quality.results}


def _task_rows(run: Run) -> dict[Key, TasksResult]:
    return {} if run.tasks is None else {_key(row): row for row in run.tasks.results}


def _same_text(first: Run, second: Run) -> bool:
    one, other = first.quality, second.quality
    if one is None or other is None or not one.text_hash:
        return False
    return (one.text_hash, one.dense_prefix) == (other.text_hash, other.dense_prefix)


def _change(name: str, first: float | None, second: float | None) -> Change:
    difference = None if first is None or second is None else second - first
    return Change(name=name, first=first, second=second, difference=difference)


def _dense(first: Run, second: Run) -> list[Change]:
    perplexities = [
        None if run.quality is None else run.quality.dense.perplexity for run in (first, second)
    ]
    changes = [] if perplexities == [None, None] else [_change("perplexity", *perplexities)]
    speeds = [_dense_speed(run) for run in (first, second)]
    if speeds != [None, None]:
        changes.append(_change("tokens/s", *speeds))
    dense = [None if run.tasks is None else run.tasks.dense for run in (first, second)]
    return changes + _tasks(*dense)


def _dense_speed(run: Run) -> float | None:
    if run.speed is None:
        return None
    rows = [x.tokens_per_second for x in run.speed.baselines if x.same_precision]
    return max((x for x in rows if x is not None), default=None)


def _quality(
    first: SparseResult | None, second: SparseResult | None, same_text: bool
) -> list[Change]:
    if first is None and second is None:
        return []
    names = {
        "sparsity": "sparsity",
        "bytes": "bytes a token",
        "perplexity": "perplexity",
        "kl": "KL",
        "top1_agreement": "same first token",
    }
    changes = [
        _change(shown, getattr(first, name, None), getattr(second, name, None))
        for name, shown in names.items()
    ]
    if first is not None and second is not None and same_text:
        sums = [[(w.nll, w.positions) for w in row.windows] for row in (first, second)]
        means = [sum(x for x, _ in one) / sum(n for _, n in one) for one in sums]
        difference = means[1] - means[0]
        changes.append(
            Change(
                name="NLL, nats a token",
                first=means[0],
                second=means[1],
                difference=difference,
                stderr=_ratio_error(
                    [b - a for (a, _), (b, _) in zip(*sums, strict=True)], [n for _, n in sums[0]]
                ),
            )
        )
    return changes


def _ratio_error(sums: list[float], sizes: list[int]) -> float | None:
    """Return the standard error of sum(sums) / sum(sizes), windows being the units."""
    count, total = len(sums), sum(sizes)
    if count < 2:
        return None
    mean = sum(sums) / total
    spread = sum((x - mean * size) ** 2 for x, size in zip(sums, sizes, strict=True))
    return math.sqrt(spread * count / (count - 1)) / total


def _speeds(first: Run, second: Run, key: Key) -> list[Change]:
    speeds = [_speed(run, key) for run in (first, second)]
    return [] if speeds == [None, None] else [_change("tokens/s", *speeds)]


def _speed(run: Run, key: Key) -> float | None:
    if run.speed is None or run.quality is None:
        return None
    rows = zip(run.quality.results, run.speed.results, strict=True)  # a report's are in one order
    return next((speed.tokens_per_second for row, speed in rows if _key(row) == key), None)


def _tasks(first: TasksResult | None, second: TasksResult | None) -> list[Change]:
    """Return each metric of each task; pairs where both runs asked the same questions."""
    changes = []
    ones = {} if first is None else first.tasks
    others = {} if second is None else second.tasks
    for task in dict.fromkeys([*ones, *others]):
        one, other = ones.get(task), copy.deepcopy(others.get(task))
        if other is not None:
            for metric in other.metrics.values():  # to the dense model; not what is asked here
                metric.difference = metric.difference_stderr = None
            if one is not None:
                fill_differences(other, one)
        before_all = {} if one is None else one.metrics
        after_all = {} if other is None else other.metrics
        for name in dict.fromkeys([*before_all, *after_all]):
            before, after = before_all.get(name), after_all.get(name)
            change = _change(
                f"{task}, {name.removesuffix(',none')}",
                None if before is None else before.value,
                None if after is None else after.value,
            )
            if after is not None and after.difference is not None:
                change.difference, change.stderr = after.difference, after.difference_stderr
            changes.append(change)
    return changes
