"""Make a report: each part is measured in turn, and kept until the report is whole.

Started again after an interruption with the same model, plans and settings, it goes on with the
part where it was.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from wina.allocation.build import versions
from wina.bench import BenchReport, BenchSettings, bench
from wina.bench.operators import Roofline, roofline
from wina.calibration import FileText
from wina.calibration.collect import Sums, add_scores
from wina.errors import UsageError
from wina.evaluation import Evaluation, Limits, evaluate, text_windows
from wina.evaluation.tasks import Tasks, TasksEvaluation, evaluate_tasks
from wina.files import kept, work_folder
from wina.layers import scoring
from wina.layers.linear import read_by_others
from wina.models import LoadedModel, context_limit, find_sites, identify
from wina.plan import Plan
from wina.report.document import (
    PlanNote,
    Recommendation,
    Report,
    Sample,
    ScoreHistogram,
    ScoreHistograms,
)
from wina.report.samples import write_samples
from wina.statistics import BINS, bin_edges

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short recipe for tomato soup.",
    "What is the difference between a list and a tuple in Python?",
)
INCREASE = 0.05  # of perplexity, that a recommendation may cost where no limit is given
HOW_FOUND = "the highest sparsity whose 95 % upper bound keeps it on {texts} (bisection)"
HOW_JUDGED = "the most sparse of these plans whose 95 % upper bound on the scored text keeps it"
BASELINES = ("own-compiled", "prepacked")
SCORED_WINDOWS = 2  # whose scores the histograms count
LOWEST, HIGHEST = -8, 6  # octaves of the histograms' edges around the threshold
PER_OCTAVE = 4


@dataclass(frozen=True)
class ReportSettings:
    """What is measured.

    Attributes:
        text: UTF-8 files to score; none takes Python's own documentation.
        tokens: to score at most.
        context: positions of a window.
        dense_prefix: first positions of a window, dense and not scored.
        prompts: that are answered side by side.
        new_tokens: of an answer at most.
        speed: whether decoding and operators are timed.
        rounds: turns of each timing.
        baselines: dense ways to decode, as ``wina bench`` names them.
        limit: questions of each task at most.
        batch_size: requests of a task that share a forward pass.
    """

    text: tuple[Path, ...] = ()
    tokens: int = 8_192
    context: int = 512
    dense_prefix: int = 20
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 80
    speed: bool = True
    rounds: int = 9
    baselines: tuple[str, ...] = BASELINES
    limit: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.rounds < 1:
            raise UsageError("tokens of an answer and rounds must be at least 1")


@dataclass(frozen=True)
class Found:
    """A plan that was looked for to keep limits on texts.

    Attributes:
        plan: the plan.
        use: the options of ``wina run`` that use it.
        texts: names of those on which the limits were kept.
    """

    plan: Plan
    use: str
    texts: tuple[str, ...] = ("held-out text",)


class _Samples(BaseModel):
    samples: list[Sample]


def make_report(
    loaded: LoadedModel,
    plans: Sequence[Plan],
    settings: ReportSettings,
    *,
    uses: Sequence[str] | None = None,
    tasks: Tasks | None = None,
    recommended: Found | None = None,
    limits: Limits | None = None,
    source: str | None = None,
    output: Path | None = None,
    command: str = "",
) -> Report:
    """Measure plans of one model.

    Args:
        loaded: the model, dense; dense again at the end.
        plans: with threshold selection, for the same linears; at least one.
        settings: what is measured.
        uses: options of ``wina run`` for each plan; None says its sparsity and method.
        tasks: to score, from ``check_tasks``.
        recommended: a plan that was found for ``limits``; it joins ``plans``.
        limits: what a recommended plan may lose; without a plan found for them, the most sparse
            of ``plans`` that keeps them on the scored text is recommended.
        source: arguments of ``wina run`` that load the model; None is its name.
        output: the report's file; work in progress is kept beside it.
        command: that makes the report again, for the record.

    Raises:
        UsageError: no plans, plans for scoring alone, or settings that do not fit the model.
    """
    said = [_use(plan) for plan in plans] if uses is None else list(uses)
    if recommended is not None:
        plans, said = [*plans, recommended.plan], [*said, recommended.use]
    if not plans:
        raise UsageError("a report needs at least one sparsity above 0")
    if any(plan.document.selection != "threshold" for plan in plans):
        raise UsageError("a report is of plans that kernels run: their selection is threshold")
    if any(plan.document.linears.keys() != plans[0].document.linears.keys() for plan in plans):
        raise UsageError("the plans of a report are for the same linears of one model")
    order = sorted(range(len(plans)), key=lambda i: plans[i].document.target_sparsity)
    plans, said = [plans[i] for i in order], [said[i] for i in order]
    model = loaded.model
    notes: list[str] = []
    parts = ["quality-dense", *(f"quality-{i}" for i in range(len(plans)))]
    parts += ["speed", "operators", "scores", "samples"]
    names = [f"{part}.json" for part in parts]
    with work_folder(output, _fingerprint(loaded, plans, settings), names) as work:
        quality = evaluate(
            model,
            loaded.tokenizer,
            plans,
            settings.text,
            name=loaded.name,
            tokens=settings.tokens,
            context=settings.context,
            dense_prefix=settings.dense_prefix,
            work=work,
        )
        chosen = _recommendation(plans, quality, recommended, limits)
        shown = len(plans) - 1 if chosen.plan is None else chosen.plan
        scores = kept(
            work / "scores.json",
            ScoreHistograms,
            lambda: _scores(loaded, plans, shown, settings),
        )
        samples = kept(
            work / "samples.json",
            _Samples,
            lambda: _Samples(
                samples=write_samples(loaded, plans, settings.prompts, settings.new_tokens)
            ),
        )
        found: TasksEvaluation | None = None
        if tasks is not None:  # which keeps its answers itself
            found = evaluate_tasks(
                model,
                loaded.tokenizer,
                plans,
                tasks,
                name=loaded.name,
                limit=settings.limit,
                batch_size=settings.batch_size,
            )
            notes += [f"Task {task} failed: {error}" for task, error in found.failures.items()]
        speed: BenchReport | None = None
        operators: Roofline | None = None
        if not settings.speed:
            notes.append("Speed was not measured.")
        elif foreign := read_by_others(model):
            notes.append(f"Speed was not measured: another library keeps {foreign[0]} and others.")
        elif any(plan.parts for plan in plans):
            notes.append("Speed was not measured: plans with more than thresholds share no layout.")
        else:
            speed = kept(work / "speed.json", BenchReport, lambda: _speed(loaded, plans, settings))
            operators = kept(
                work / "operators.json",
                Roofline,
                lambda: roofline(model, plans, _window(loaded, settings), settings.rounds),
            )
    return Report(
        model=loaded.name,
        source=source or loaded.name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        settings=_described(settings, plans, loaded),
        machine=_machine(model),
        versions=versions(),
        plans=[
            PlanNote(name=name, use=use, calibration=plan.document.calibration)
            for name, use, plan in zip(_names(plans), said, plans, strict=True)
        ],
        quality=quality,
        tasks=found,
        speed=speed,
        operators=operators,
        scores=scores if scores.histograms else None,
        samples=samples.samples,
        recommendation=chosen,
        notes=notes,
    )


def _fingerprint(loaded: LoadedModel, plans: Sequence[Plan], settings: ReportSettings) -> str:
    facts = {
        "model": identify(loaded.model, loaded.name).model_dump(),
        "device": str(loaded.model.device),
        "plans": [(plan.document.model_dump(), plan.digest) for plan in plans],
        "text": FileText(settings.text).describe() if settings.text else "",
        "settings": asdict(settings),
        "versions": versions(),
    }
    return json.dumps(facts, default=str, sort_keys=True)


def _use(plan: Plan) -> str:
    document = plan.document
    use = f"--sparsity {document.target_sparsity:g} --method {document.method}"
    if document.allocation != document.method:
        use += f" --allocation {document.allocation}"
    return use + (" --include-head" if document.include_head else "")


def _names(plans: Sequence[Plan]) -> list[str]:
    """Return what each plan is called: as little as tells them apart."""
    methods = {plan.document.method for plan in plans}
    pairs = {(x.document.method, x.document.allocation) for x in plans}
    found = []
    for plan in plans:
        document = plan.document
        parts = [f"{round(100 * document.target_sparsity, 1):g} %"]
        if len(pairs) > len(methods) and document.allocation != document.method:
            parts.insert(0, document.allocation)
        if len(pairs) > 1:
            parts.insert(0, document.method)
        found.append(" ".join(parts))
    return found


def _recommendation(
    plans: Sequence[Plan],
    quality: Evaluation,
    recommended: Found | None,
    limits: Limits | None,
) -> Recommendation:
    if recommended is not None:
        number = next(i for i, x in enumerate(plans) if x is recommended.plan)
        how = HOW_FOUND.format(texts=_listed(recommended.texts))
        return Recommendation(plan=number, limits=str(limits), how=how)
    limits = limits or Limits(perplexity_increase=INCREASE)
    kept_by = [
        number
        for number, row in enumerate(quality.results)
        if _within(row.increase_upper, limits.perplexity_increase)
        and _within(row.kl_upper, limits.kl)
    ]
    best = max(kept_by, key=lambda i: quality.results[i].sparsity, default=None)
    return Recommendation(plan=best, limits=str(limits), how=HOW_JUDGED)


def _listed(names: Sequence[str]) -> str:
    first, last = ", ".join(names[:-1]), names[-1]
    return f"{first} and {last}, each by itself" if first else last


def _within(upper: float | None, limit: float | None) -> bool:
    return limit is None or (upper is not None and upper <= limit)


def _window(loaded: LoadedModel, settings: ReportSettings) -> torch.Tensor:
    return _windows(loaded, settings)[0]


def _windows(loaded: LoadedModel, settings: ReportSettings) -> list[torch.Tensor]:
    found, _ = text_windows(
        loaded.model,
        loaded.tokenizer,
        settings.text,
        settings.tokens,
        settings.context,
        settings.dense_prefix,
    )
    return found[:SCORED_WINDOWS]


def _scores(
    loaded: LoadedModel, plans: Sequence[Plan], number: int, settings: ReportSettings
) -> ScoreHistograms:
    """Count |x_j| / t_j of a plan's linears, by kind and block, on the first scored windows."""
    model, plan = loaded.model, plans[number]
    edges = [2.0 ** (x / PER_OCTAVE) for x in range(LOWEST * PER_OCTAVE, HIGHEST * PER_OCTAVE + 1)]
    if plan.parts:  # whose gates do not see the linears' inputs
        return ScoreHistograms(plan=number, edges=edges, histograms=[])
    sites = [x for x in find_sites(model) if x.name in plan.vectors]
    scales = {
        # A threshold of 0 drops nothing: all is far above it.
        x.name: torch.where((t := plan.vectors[x.name]) > 0, 1 / t, 2.0**40).to(model.device)
        for x in sites
    }
    sums: Sums = {}
    below = bin_edges()[1:] <= 1
    with scoring(model, plan, settings.dense_prefix):
        for ids in _windows(loaded, settings):
            ids = ids.to(model.device)
            add_scores(model, sites, {"ratio": scales}, ids, settings.dense_prefix, sums)
    places = dict.fromkeys((x.kind, x.block) for x in sites if x.block is not None)
    found = []
    for kind, block in places:
        members = [x.name for x in sites if (x.kind, x.block) == (kind, block)]
        keys = [f"scores/ratio/{name}" for name in members]
        counts = sum((sums[x] for x in keys if x in sums), torch.zeros(1)).cpu().reshape(-1)
        if counts.numel() != BINS or not counts.sum():
            continue  # an expert that saw no token
        shares = counts.double() / counts.sum()
        found.append(
            ScoreHistogram(
                kind=kind,
                block=block,
                shares=_rebinned(shares),
                dropped=float(shares[below].sum()),
                others=_other_thresholds(plans, number, members),
            )
        )
    return ScoreHistograms(plan=number, edges=edges, histograms=found)


def _rebinned(shares: torch.Tensor) -> list[float]:
    """Return the shares in PER_OCTAVE bins an octave, the outer ones with all beyond them.

    Each takes the histogram's bins whose middle lies in it.
    """
    ends = bin_edges().double()
    middles = (ends[1:] + ends[:-1]) / 2
    place = ((middles.log2() - LOWEST) * PER_OCTAVE).floor().long()
    bins = (HIGHEST - LOWEST) * PER_OCTAVE
    found = torch.zeros(bins).double().index_add_(0, place.clamp(0, bins - 1), shares)
    return [round(x, 6) for x in found.tolist()]


def _other_thresholds(
    plans: Sequence[Plan], number: int, members: Sequence[str]
) -> dict[int, float]:
    own = plans[number].vectors
    found = {}
    for other, plan in enumerate(plans):
        if other == number or any(name not in plan.vectors for name in members):
            continue
        ratio = torch.cat([plan.vectors[name] / own[name] for name in members])
        middle = float(ratio[ratio.isfinite()].median()) if ratio.isfinite().any() else 0.0
        if middle > 0:
            found[other] = middle
    return found


def _speed(loaded: LoadedModel, plans: Sequence[Plan], settings: ReportSettings) -> BenchReport:
    targets = [plan.document.target_sparsity for plan in plans]
    following = iter(plans)
    limit = context_limit(loaded.model)
    chosen = BenchSettings(
        sparsities=targets,  # in order, so that results are in the order of plans
        context=min(512, (limit or 1024) // 2),
        rounds=settings.rounds,
        baselines=settings.baselines,
        compare_tokens=16,
    )
    document = plans[0].document
    return bench(
        loaded.model,
        lambda _sparsity: next(following),
        chosen,
        name=loaded.name,
        method=", ".join(dict.fromkeys(plan.document.method for plan in plans)),
        include_head=document.include_head,
    )


def _described(
    settings: ReportSettings, plans: Sequence[Plan], loaded: LoadedModel
) -> dict[str, str]:
    document = plans[0].document
    found: Mapping[str, object] = {
        "model": loaded.name,
        "revision": loaded.revision or "",
        "weights (SHA-256)": identify(loaded.model, loaded.name).weights_hash,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "methods": ", ".join(dict.fromkeys(x.document.method for x in plans)),
        "allocations": ", ".join(dict.fromkeys(x.document.allocation for x in plans)),
        "planned linears": len(document.linears),
        "output head": "sparse" if document.include_head else "dense",
        "calibration text": document.calibration.get("source", ""),
        "calibration tokens": document.calibration.get("tokens", ""),
        "scored tokens, at most": settings.tokens,
        "dense prefix of a window": settings.dense_prefix,
        "rounds of timing": settings.rounds if settings.speed else "",
    }
    return {name: str(value) for name, value in found.items() if value not in ("", None)}


def _machine(model: PreTrainedModel) -> dict[str, str]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": name,
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
