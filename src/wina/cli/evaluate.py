"""`wina eval`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from wina.calibration.text import check_text
from wina.cli import options
from wina.cli.tasks import show_tasks
from wina.errors import UsageError, WinaError
from wina.evaluation import Evaluation
from wina.evaluation import evaluate as run_evaluation
from wina.evaluation.tasks import check_tasks, evaluate_tasks
from wina.models import identify
from wina.plan import Plan


def evaluate(
    model: options.Model = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text file; may be repeated.")
    ] = None,
    plan: options.PlanSource = None,
    calibration: options.CalibrationFolder = None,
    sparsity: options.Sparsity = 0.5,
    sweep: Annotated[
        str | None, typer.Option(help="Several sparsities, such as 0.25,0.4,0.5,0.65.")
    ] = None,
    method: options.Method = None,
    allocation: options.Allocation = None,
    selection: options.Selection = "threshold",
    include_head: options.IncludeHead = False,
    tokens: Annotated[int, typer.Option(help="How many to score at most.")] = 16_384,
    context: Annotated[
        int | None,
        typer.Option(
            help="Positions of a window; 2,048, or the model's if less.", show_default=False
        ),
    ] = None,
    dense_prefix: options.DensePrefix = 20,
    tasks: options.Tasks = None,
    task_data: options.TaskData = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Measure what sparsity loses: on a text, perplexity, KL and agreement; on tasks, their scores.

    --method and --sweep take several values separated by commas; each pair is a row. Differences
    in task scores are paired with the dense model's, question by question. An interrupted
    evaluation of tasks goes on where it was.

    Examples:
        wina eval demo --text corpus.txt --tokens 8192

        wina eval demo --text corpus.txt --calibration calibration --sweep 0.25,0.4,0.5,0.65

        wina eval demo --text corpus.txt --plan plan --json

        wina eval demo --tasks piqa --task-data data --plan plan
    """
    if not text and tasks is None:
        raise UsageError("name a text to score, --text FILE, or --tasks NAMES")
    for path in text or ():
        check_text(path)
    found_tasks = None if tasks is None else check_tasks(tasks.split(","), task_data)
    targets = options.numbers(sweep, "--sweep", float) if sweep is not None else [sparsity]
    methods = [None] if method is None else method.split(",")
    for one in methods:
        for target in targets:
            options.check_request(target, one, allocation, selection)
    found_plan, found_calibration = options.load_artifacts(plan, calibration)
    if found_plan is not None and sweep is not None:
        raise UsageError("a plan has one sparsity; use --calibration with --sweep")
    loaded = options.load(model, dtype, device, revision, trust_remote_code, quantize)
    artifact = found_plan or found_calibration
    if artifact is not None:
        artifact.document.model.check(identify(loaded.model, loaded.name))

    def plans() -> Iterator[Plan]:
        if found_plan is not None:
            yield found_plan
            return
        for one in methods:
            for target in targets:
                yield options.find_plan(
                    loaded,
                    None,
                    found_calibration,
                    target,
                    one,
                    allocation,
                    selection,
                    include_head,
                    seed,
                )

    # Made once; both parts use them.
    made = list(plans())
    content: dict[str, Any] = {}
    if text:
        result = run_evaluation(
            loaded.model,
            loaded.tokenizer,
            made,
            text,
            name=loaded.name,
            tokens=tokens,
            context=context,
            dense_prefix=dense_prefix,
        )
        content = result.model_dump(mode="json")
        if not as_json:
            _show(result)
    failures: dict[str, str] = {}
    if found_tasks is not None:
        scores = evaluate_tasks(
            loaded.model,
            loaded.tokenizer,
            made,
            found_tasks,
            name=loaded.name,
            limit=limit,
            batch_size=batch_size,
        )
        content["tasks"] = scores.model_dump(mode="json")
        failures = scores.failures
        if not as_json:
            show_tasks(scores)
    if as_json:
        options.print_json(content)
    if failures:
        names = ", ".join(failures)
        raise WinaError(f"{len(failures)} of the tasks failed: {names}; the others are above")


def _show(result: Evaluation) -> None:
    table = Table("plan", "target", "sparsity", "perplexity", "KL", "top-1")
    table.add_row("dense", "", "0.0%", f"{result.dense.perplexity:.3f}", "", "")
    for row in result.results:
        table.add_row(
            f"{row.method}, {row.allocation}, {row.selection}",
            f"{row.target_sparsity:.1%}",
            f"{row.sparsity:.1%}",
            f"{row.perplexity:.3f}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
        )
    console = Console()
    console.print(table)
    if len(result.results) == 1:
        row = result.results[0]
        shares = ", ".join(f"{kind} {share:.2f}" for kind, share in row.by_kind.items())
        console.print(f"sparsity by projection: {shares}", highlight=False)
        shares = ", ".join(f"{share:.2f}" for share in row.by_block.values())
        console.print(f"sparsity by block: {shares}", highlight=False)
    console.print(
        f"[dim]{result.model}, {result.scored_positions} positions of {', '.join(result.text)}, "
        f"context {result.context}, first {result.dense_prefix} of each window dense, "
        f"{result.dtype} on {result.device}; KL in nats a token, top-1 agreement with dense[/dim]",
        highlight=False,
    )
