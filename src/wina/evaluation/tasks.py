"""Tasks of lm-evaluation-harness, dense and sparse on the same questions.

What a plan loses is the mean of the paired differences, question by question, and its standard
error is theirs: the questions' own difficulty, which makes most of the spread of either score,
falls out.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.allocation.build import versions
from wina.errors import UsageError, WinaError
from wina.files import cached
from wina.layers import densify
from wina.models import identify
from wina.plan import Plan
from wina.progress import note

BOOTSTRAP = 1_000  # of standard errors that have no formula

logger = logging.getLogger(__name__)


class Metric(BaseModel):
    """One metric of one task.

    Attributes:
        value: the harness's own figure.
        stderr: its standard error over questions; None if the harness gives none.
        questions: its value for each question, in order; None for metrics that have none.
        difference: mean over questions of this minus dense; None for the dense model itself.
        difference_stderr: standard error of that mean, questions drawn together.
        changed: share of questions whose value is another than the dense model's.
    """

    value: float
    stderr: float | None
    higher_is_better: bool = True
    questions: list[float] | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    changed: float | None = None


class TaskScore(BaseModel):
    """One task's metrics, by the harness's name of metric and filter, such as ``acc,none``.

    Attributes:
        asked: SHA-256 over the questions and their prompts, in order: scores with equal ones can
            be compared question by question.
        shots: examples before each question.
        version: the harness's, of the task.
    """

    metrics: dict[str, Metric]
    count: int
    asked: str
    shots: int
    version: str
    data: str


class TasksResult(BaseModel):
    """What one model scored; ``method`` is ``dense`` for the dense one.

    Attributes:
        sparsity: realized on the tasks' own positions; None for the dense model.
        failures: error by task, of those that failed.
    """

    method: str
    allocation: str | None = None
    selection: str | None = None
    target_sparsity: float = 0.0
    sparsity: float | None = None
    tasks: dict[str, TaskScore] = {}
    failures: dict[str, str] = {}


class TasksEvaluation(BaseModel):
    """Settings, the dense model's scores, and those of each plan."""

    model: str
    limit: int | None
    batch_size: int
    scoring: str
    device: str
    dtype: str
    versions: dict[str, str]
    dense: TasksResult
    results: list[TasksResult]

    @property
    def failures(self) -> dict[str, str]:
        """Error by task, of any model."""
        return {
            task: error
            for one in (self.dense, *self.results)
            for task, error in one.failures.items()
        }


def check_tasks(names: Sequence[str], data: Path | None = None) -> Tasks:
    """Return the tasks that ``names`` name; nothing is downloaded yet.

    Args:
        names: tasks or groups of the harness, or of the configurations in ``data``.
        data: a folder with task configurations (``*.yaml``, as the harness reads them) and files
            of tasks that wina knows (``LOCAL``); they come before the harness's own.

    Raises:
        WinaError: lm-eval is not installed.
        UsageError: an unknown task, or no such folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise WinaError("--tasks needs lm-evaluation-harness: pip install 'wina[eval]'")
    if data is not None and not data.is_dir():
        raise UsageError(f"there is no folder {str(data)!r} with task data")
    if not names or any(not name for name in names):
        raise UsageError("name at least one task, several with commas between them")
    if len(set(names)) < len(names):
        raise UsageError("a task is named twice")
    return Tasks(names, data)


class Tasks:
    """Tasks found by name; ``load`` reads one's questions."""

    def __init__(self, names: Sequence[str], data: Path | None) -> None:

        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.names = list(names)
        self._local: dict[str, tuple[dict[str, Any], str]] = {}
        for name in names:
            found = LOCAL[name](data) if data is not None and name in LOCAL else None
            if found is not None:
                self._local[name] = found
        # The harness's own thousands of files are read only for a task that is not in the folder.
        folder = None if data is None else str(data)
        self.manager = TaskManager(include_path=folder, include_defaults=False)
        own = {*self._local, *self.manager.all_subtasks}
        if not own.issuperset(names):
            self.manager = TaskManager(include_path=folder)
        known = {*self._local, *self.manager.all_tasks}
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise UsageError(f"unknown task {name!r}.{hint} See: lm-eval ls tasks")

    def load(self, name: str) -> tuple[Any, str]:
        """Return the harness's task or group, and where its data came from."""
        config, source = self._local.get(name, (name, "as the task's configuration says"))
        loaded = self.manager.load([config])
        return loaded["groups"].get(name) or loaded["tasks"].get(name) or _tagged(loaded), source


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    plans: Iterable[Plan],
    tasks: Tasks,
    *,
    name: str,
    limit: int | None = None,
    batch_size: int = 1,
) -> TasksEvaluation:
    """Score the dense model and each plan on tasks.

    Answers are kept in the cache as they come, so that an interrupted evaluation goes on where it
    was. A task that fails is recorded, and the others go on.

    Args:
        model: dense, in evaluation mode; dense again at the end.
        tokenizer: its tokenizer.
        plans: what to score, in order.
        tasks: from ``check_tasks``.
        name: of the model, for the record.
        limit: the first so many questions of each task.
        batch_size: requests of equal length that share a forward pass.
    """
    from wina.integrations.lm_eval import SCORING

    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1; got {limit}")
    identity = identify(model, name)
    made = {**versions(), "lm_eval": version("lm_eval")}
    loaded: dict[str, tuple[Any, str]] = {}
    unreadable: dict[str, str] = {}
    for task in tasks.names:
        try:
            loaded[task] = tasks.load(task)
        except Exception as error:  # data sets and their code may fail in any way
            unreadable[task] = _said(error)
            note(f"task {task} cannot be loaded: {unreadable[task]}", style="red")

    def score(plan: Plan | None) -> TasksResult:
        facts = [identity.config_hash, identity.weights_hash, identity.dtype, model.device.type]
        path = _entry([*facts, made, batch_size], plan)
        result = _score(model, tokenizer, plan, loaded, tasks.manager, path, limit, batch_size)
        result.failures = {**unreadable, **result.failures}
        return result

    dense = score(None)
    results = [_paired(score(plan), dense) for plan in plans]
    return TasksEvaluation(
        model=name,
        limit=limit,
        batch_size=batch_size,
        scoring=SCORING,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=made,
        dense=dense,
        results=results,
    )


def paired_difference(values: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """Return the mean of ``values - dense`` and its standard error, sd / sqrt(n)."""
    differences = [one - other for one, other in zip(values, dense, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    spread = math.fsum((x - mean) ** 2 for x in differences) / max(1, count - 1)
    return mean, math.sqrt(spread / count)


def _score(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    plan: Plan | None,
    tasks: Mapping[str, tuple[Any, str]],
    manager: Any,
    path: Path,
    limit: int | None,
    batch_size: int,
) -> TasksResult:
    from lm_eval import simple_evaluate

    from wina.integrations.lm_eval import Answers, WinaLM

    what = "dense"
    result = TasksResult(method="dense")
    if plan is not None:
        document = plan.document
        what = f"{document.method} {document.allocation} {document.target_sparsity:.0%}"
        result = TasksResult(
            method=document.method,
            allocation=document.allocation,
            selection=document.selection,
            target_sparsity=document.target_sparsity,
        )
    answers = Answers(path)
    try:
        lm = WinaLM(model, plan, tokenizer=tokenizer, answers=answers, batch_size=batch_size)
        for task, (loaded, source) in tasks.items():
            note(f"{what}: {task}")
            try:
                found = simple_evaluate(
                    model=lm,
                    tasks=[loaded],
                    limit=limit,
                    bootstrap_iters=BOOTSTRAP,
                    log_samples=True,
                    task_manager=manager,
                )
                result.tasks[task] = _task_score(task, found, source)
            except Exception as error:  # a task's own code may fail in any way
                logger.debug("task %s failed", task, exc_info=True)
                result.failures[task] = _said(error)
                note(f"task {task} failed ({what}): {result.failures[task]}", style="red")
        result.sparsity = answers.sparsity
    finally:
        densify(model)
    return result


def _task_score(task: str, found: Mapping[str, Any], source: str) -> TaskScore:
    """Take what is needed from the harness's results of one task, group or tag."""
    parts = found["samples"]
    samples = [sample for part in sorted(parts) for sample in parts[part]]
    own = found["results"].get(task)
    if own is None and len(parts) == 1:
        own = next(iter(found["results"].values()))
    if own is None:
        raise WinaError(f"{task} is a collection without a score of its own; name its members")
    metrics = {}
    better = {
        metric: bool(way)
        for ways in found["higher_is_better"].values()
        for metric, way in ways.items()
        if way is not None
    }
    for key, value in own.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = own.get(f"{metric}_stderr,{filtered}")
        each = [sample.get(metric) for sample in samples if sample["filter"] == filtered]
        numbers = bool(each) and all(isinstance(x, (int, float)) for x in each)
        metrics[key] = Metric(
            value=float(value),
            stderr=float(error) if isinstance(error, (int, float)) else None,
            higher_is_better=better.get(metric, True),
            questions=[float(x) for x in each] if numbers else None,
        )
    names = {sample["filter"] for sample in samples}
    first = [sample for sample in samples if sample["filter"] == min(names)]
    digest = hashlib.sha256()
    for sample in first:
        digest.update(f"{sample['doc_hash']} {sample['prompt_hash']}\n".encode())
    return TaskScore(
        metrics=metrics,
        count=len(first),
        asked=digest.hexdigest(),
        shots=int(next(iter(found["n-shot"].values()), 0) or 0),
        version=str(next(iter(found["versions"].values()), "")),
        data=source,
    )


def _paired(result: TasksResult, dense: TasksResult) -> TasksResult:
    """Fill in the differences to the dense model."""
    for task, score in result.tasks.items():
        other = dense.tasks.get(task)
        if other is not None:
            fill_differences(score, other)
    return result


def fill_differences(score: TaskScore, other: TaskScore) -> None:
    """Set the paired differences of ``score`` to ``other``, where both were asked the same."""
    for name, metric in score.metrics.items():
        base = other.metrics.get(name)
        if base is None or not metric.questions or not base.questions:
            continue
        if score.asked != other.asked:
            continue
        pair = paired_difference(metric.questions, base.questions)
        metric.difference, metric.difference_stderr = pair
        changed = sum(x != y for x, y in zip(metric.questions, base.questions, strict=True))
        metric.changed = changed / len(metric.questions)


def _tagged(loaded: Mapping[str, Any]) -> Any:
    raise WinaError(f"it is a tag; name its tasks: {', '.join(sorted(loaded['tasks']))}")


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _entry(facts: Sequence[object], plan: Plan | None) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    if plan is not None:
        digest.update(plan.digest.encode())
    return cached("answers", f"{digest.hexdigest()[:24]}.jsonl")


def _piqa(folder: Path) -> tuple[dict[str, Any], str] | None:
    """Return the configuration of PIQA (arXiv 1911.11641) over local files, if they are there.

    The files are the published ones: a question a line with ``goal``, ``sol1`` and ``sol2``, and a
    label a line, 0 or 1. Prompt and metrics are those of the harness's own ``piqa``.
    """
    names = [("valid.jsonl", "valid-labels.lst"), ("piqa-valid.jsonl", "piqa-valid-labels.lst")]
    paths = next((x for x in names if all((folder / part).is_file() for part in x)), None)
    if paths is None:
        return None

    def read(**_settings: Any) -> dict[str, Any]:
        from datasets import Dataset

        questions, labels = ((folder / path).read_text(encoding="utf-8") for path in paths)
        rows = [json.loads(line) for line in questions.splitlines() if line.strip()]
        answers = [int(line) for line in labels.split()]
        if len(rows) != len(answers):
            raise WinaError(f"{folder}: {len(rows)} questions, {len(answers)} labels")
        if (
            not rows
            or set(answers) - {0, 1}
            or any({"goal", "sol1", "sol2"} - set(x) for x in rows)
        ):
            raise WinaError(f"{folder / paths[0]} is not PIQA: goal, sol1, sol2 and labels 0 or 1")
        listed = [{**row, "label": label} for row, label in zip(rows, answers, strict=True)]
        return {"validation": Dataset.from_list(listed)}

    config = {
        "task": "piqa",
        "custom_dataset": read,
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    return config, ", ".join(paths)


# Tasks whose published files wina reads itself; others come as the harness's YAML in the folder.
LOCAL: dict[str, Callable[[Path], tuple[dict[str, Any], str] | None]] = {"piqa": _piqa}
