"""`wina report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from wina.calibration.text import check_text
from wina.cli import options
from wina.errors import UsageError
from wina.evaluation.tasks import check_tasks
from wina.files import write_text
from wina.models import DEMO, identify
from wina.plan import Plan
from wina.progress import note
from wina.report import ReportSettings, make_report, render
from wina.report.measure import BASELINES, PROMPTS, Found
from wina.report.plots import check_plots
from wina.selection import check_sparsity
from wina.tuning import TUNED

METHOD_OF_LIMIT = "loss"


def report(
    context: typer.Context,
    model: options.Model = None,
    sparsities: Annotated[
        str, typer.Option(help="Targets; each method gets a plan for each of them.")
    ] = "0.25,0.4,0.5,0.65",
    method: options.Method = None,
    allocation: options.Allocation = None,
    include_head: options.IncludeHead = False,
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", help="Instead of --sparsities: a folder or hub id; repeatable."),
    ] = None,
    calibration: options.CalibrationFolder = None,
    max_increase: options.MaxIncrease = None,
    max_kl: options.MaxKl = None,
    limit_text: options.LimitText = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text to score; may be repeated. Omitted: Python's documentation."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many of it to score at most.")] = 8_192,
    window: Annotated[int, typer.Option("--context", help="Positions of a window.")] = 512,
    dense_prefix: options.DensePrefix = 20,
    tasks: options.Tasks = None,
    task_data: options.TaskData = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 8,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Answered side by side; may be repeated.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 80,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time decoding and each operator.")
    ] = True,
    rounds: Annotated[int, typer.Option(help="Turns of each timing.")] = 9,
    baselines: Annotated[
        str, typer.Option(help="Dense ways to decode, by comma, as wina bench names them.")
    ] = ",".join(BASELINES),
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path(
        "report.html"
    ),
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Show on one page what a model gains and loses: quality, speed, text, and why.

    The page holds everything it needs and opens anywhere. All numbers go into a JSON file beside
    it, which wina compare reads. With --max-perplexity-increase or --max-kl the plan that keeps
    the limit on held-out text is looked for, and marked; otherwise the most sparse of the plans
    that keep 5 % of perplexity on the scored text is. An interrupted report goes on where it was.

    Examples:
        wina report demo -o report.html

        wina report demo --sparsities 0.4,0.5 --method wina,loss --text test.txt

        wina report demo --tasks piqa --task-data data --max-perplexity-increase 5%
    """
    check_plots()
    if output.suffix not in (".html", ".htm"):
        raise UsageError(f"the report is an HTML file; name one instead of {output}")
    if plan and (method or allocation or calibration or max_increase or max_kl is not None):
        raise UsageError(
            "plans are given as they are: leave --method, --allocation, --calibration and the "
            "limits out"
        )
    targets = [] if plan else options.numbers(sparsities, "--sparsities", float)
    methods = [None] if method is None else method.split(",")
    for target in targets:
        if check_sparsity(target) == 0:
            raise UsageError("the dense model is measured anyway; sparsities must be above 0")
        for one in methods:
            options.check_request(target, one, allocation, "threshold")
    for path in text or ():
        check_text(path)
    allowed = options.limits(max_increase, max_kl, limit_text)
    settings = ReportSettings(
        text=tuple(text or ()),
        tokens=tokens,
        context=window,
        dense_prefix=dense_prefix,
        prompts=tuple(prompt or PROMPTS),
        new_tokens=max_new_tokens,
        speed=speed,
        rounds=rounds,
        baselines=tuple(filter(None, baselines.split(","))),
        limit=limit,
        batch_size=batch_size,
    )
    found_tasks = None if tasks is None else check_tasks(tasks.split(","), task_data)
    given = [Plan.load(source) for source in plan or ()]
    _, statistics = options.load_artifacts(None, calibration)
    loaded = options.load(model, dtype, device, revision, trust_remote_code, quantize)
    identity = identify(loaded.model, loaded.name)
    for one_given in given:
        one_given.document.model.check(identity)
    if statistics is not None:
        statistics.document.model.check(identity)
    plans = given or [
        options.find_plan(
            loaded, None, statistics, target, one, allocation, "threshold", include_head, seed
        )
        for one in methods
        for target in targets
    ]
    recommended = None
    if allowed is not None:
        chosen = methods[0] if methods[0] != TUNED else METHOD_OF_LIMIT
        recommendation = options.recommended(
            loaded,
            statistics or options.own_calibration(loaded, seed),
            allowed,
            chosen,
            allocation,
            "threshold",
            include_head,
            limit_text,
        )
        words = ["--max-perplexity-increase", max_increase] if max_increase is not None else []
        words += [] if max_kl is None else ["--max-kl", f"{max_kl:g}"]
        words += [word for path in limit_text or () for word in ("--limit-text", str(path))]
        words += ["--method", recommendation.plan.document.method]
        recommended = Found(recommendation.plan, shlex.join(words), tuple(recommendation.losses))
    result = make_report(
        loaded,
        plans,
        settings,
        uses=[f"--plan {shlex.quote(source)}" for source in plan] if plan else None,
        tasks=found_tasks,
        recommended=recommended,
        limits=allowed,
        source=loaded_from(model, quantize),
        output=output,
        command=options.command_line(context),
    )
    numbers = output.with_suffix(".json")
    write_text(numbers, result.model_dump_json(indent=1))
    write_text(output, render(result))
    if as_json:
        options.print_json(result.model_dump(mode="json"))
    note(f"-> {output}, {numbers}", style="none")


def loaded_from(model: str | None, quantize: str | None) -> str:
    """Return the arguments of other commands that load the same model."""
    words = [model or DEMO, *(() if quantize is None else ("--quantize", quantize))]
    return shlex.join(words)
