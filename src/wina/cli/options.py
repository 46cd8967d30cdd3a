"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic_core import to_json

from wina.cache import cached_calibration, cached_plan, tuned_at_hand
from wina.calibration import Calibration, CalibrationSettings, make_plan
from wina.calibration.text import check_text
from wina.criteria import criteria
from wina.errors import UsageError
from wina.evaluation import Limits, Recommendation, limit_windows, recommend
from wina.evaluation.recommend import WINDOW
from wina.files import digest
from wina.generation import Mode
from wina.models import LoadedModel, identify, load_model
from wina.models.gguf import keep_codes
from wina.models.loading import gguf_file
from wina.models.quantize import check_quantize
from wina.models.quantize import quantize as quantize_model
from wina.plan import Plan
from wina.progress import note
from wina.selection import check_selection, check_sparsity
from wina.tuning import TUNED, tuned_plan

Number = TypeVar("Number", int, float)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hub id, folder or GGUF file; the embedded SmolLM2-135M-Instruct if omitted.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto is CUDA if there.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Quantize the weights with torchao: int8, int4 (groups of 32), int4-g64, int4-g128; "
        "the head becomes int8. Or gguf: keep the codes of a GGUF file (Q4_0, Q4_1, Q8_0)."
    ),
]
Seed = Annotated[int, typer.Option(help="Of sampling and of the model's own text.")]
DensePrefix = Annotated[int, typer.Option(help="First positions, dense, not scored.")]
Tasks = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-evaluation-harness, such as piqa,arc_easy.", metavar="NAMES"),
]
TaskData = Annotated[
    Path | None,
    typer.Option(help="Folder with tasks' data or the harness's YAML; otherwise the hub's."),
]
Limit = Annotated[int | None, typer.Option(help="The first so many questions a task.")]
BatchSize = Annotated[int, typer.Option(help="Requests of equal length at once.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Sparsity = Annotated[float, typer.Option(help="Share of weights not touched, in [0, 1).")]
Method = Annotated[
    str | None,
    typer.Option(
        help="A criterion (wina, wina-kgate, teal, loss, ...) or tuned; omitted: tuned where a "
        "tuned plan is at hand or a GPU makes one, else loss.",
        show_default=False,
    ),
]
Retune = Annotated[
    bool, typer.Option("--retune", help="Tune a plan for this model now, and keep it.")
]
Preset = Annotated[
    str,
    typer.Option(help="A published method as a whole: wina-paper, teal-transform, larosa, ..."),
]
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
MaxIncrease = Annotated[
    str | None,
    typer.Option(
        "--max-perplexity-increase",
        help="Instead of --sparsity: the highest that keeps perplexity on held-out text within "
        "this share of the dense model's, such as 2%, by its 95 % upper bound.",
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", help="The same for the KL to the dense model, nats a token."),
]
LimitText = Annotated[
    list[Path] | None,
    typer.Option(
        "--limit-text",
        help="UTF-8 text file on which the limit is to be kept too; may be repeated.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Of a hub model.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


def load(
    model: str | None,
    dtype: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    quantize: str | None = None,
) -> LoadedModel:
    """Load the model that the options name, saying so, and quantize it if asked to."""
    codes = quantize == "gguf"
    scheme = None if codes else check_quantize(quantize)
    file = gguf_file(model) if codes else None
    note(f"loading {model or 'the embedded model'}")
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if file is not None:
        note(f"keeping the codes of {keep_codes(loaded.model, file)} linears")
    if scheme is None:
        return loaded
    note(f"quantizing to {scheme}")
    quantize_model(loaded.model, scheme)
    return replace(loaded, name=f"{loaded.name}, {scheme}")


def check_request(
    sparsity: float, method: str | None, allocation: str | None, selection: str
) -> None:
    """Raise UsageError for a bad request before anything long starts."""
    check_sparsity(sparsity)
    check_selection(selection)
    if method not in (None, TUNED):
        criteria.get(method, also=(TUNED,))
    if method == TUNED and (selection != "threshold" or sparsity == 0):
        raise UsageError("method 'tuned' has thresholds and a sparsity above 0")
    if allocation not in (None, "greedy"):
        from wina.allocation import allocations

        allocations.get(allocation, also=("greedy",))


def find_plan(
    loaded: LoadedModel,
    plan: Plan | None,
    calibration: Calibration | None,
    sparsity: float,
    method: str | None,
    allocation: str | None,
    selection: str,
    include_head: bool,
    seed: int,
    retune: bool = False,
) -> Plan:
    """Return the given plan, or one from the given calibration, or from the cache."""
    if plan is not None:
        return plan
    if calibration is not None:
        if method == TUNED:
            return tuned_plan(
                calibration,
                loaded.model,
                sparsity,
                allocation=allocation,
                include_head=include_head,
            )
        method = method or default_criterion(calibration)
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
    if method is None:
        quick = loaded.model.device.type == "cuda" or tuned_at_hand(loaded, sparsity)
        tunable = selection == "threshold" and sparsity > 0 and allocation is None
        method = TUNED if quick and tunable and not include_head else "loss"
    tuning = retune or (method == TUNED and not tuned_at_hand(loaded, sparsity))
    settings = quick_settings(loaded, seed, tuning)
    return cached_plan(
        loaded, settings, sparsity, method, allocation, selection, include_head, retune
    )


def limits(
    max_increase: str | None, max_kl: float | None, texts: Sequence[Path] | None = None
) -> Limits | None:
    """Return what --max-perplexity-increase and --max-kl allow; None without them.

    The texts of --limit-text are checked too.
    """
    if max_increase is None and max_kl is None:
        if texts:
            raise UsageError("--limit-text needs --max-perplexity-increase or --max-kl")
        return None
    for path in texts or ():
        check_text(path)
    increase = None
    if max_increase is not None:
        number = max_increase.strip().removesuffix("%")
        try:
            increase = float(number) / (1 if number == max_increase.strip() else 100)
        except ValueError:
            raise UsageError(
                f"--max-perplexity-increase takes a share such as 2% or 0.02; got {max_increase!r}"
            ) from None
    return Limits(increase, max_kl)


def recommended(
    loaded: LoadedModel,
    calibration: Calibration,
    allowed: Limits,
    method: str | None,
    allocation: str | None,
    selection: str,
    include_head: bool,
    texts: Sequence[Path] | None = None,
) -> Recommendation:
    """Find the highest sparsity within the limits on the held-out text and each text given.

    Raises:
        UsageError: calibration has read one of the texts.
    """
    chosen = method or default_criterion(calibration)
    prefix = calibration.document.dense_prefix
    windows = {"held-out text": calibration.windows(held_out=True, length=WINDOW)}
    for path in texts or ():
        if digest(path) in calibration.document.source:
            raise UsageError(f"calibration has read {path}: a limit takes text that is new to it")
        name = path.name if path.name not in windows else str(path)
        windows[name] = limit_windows(loaded.model, loaded.tokenizer, path, prefix)

    def plan_at(sparsity: float) -> Plan:
        return make_plan(
            calibration,
            sparsity,
            chosen,
            allocation,
            selection,
            include_head=include_head,
            model=loaded.model,
        )

    found = recommend(loaded.model, plan_at, windows, allowed, dense_prefix=prefix)
    note(f"{found.plan.document.target_sparsity:.0%} keeps {allowed} on {', '.join(windows)}")
    return found


def own_calibration(loaded: LoadedModel, seed: int) -> Calibration:
    """Return a calibration on the default text, with enough held-out text for a bound."""
    identity = identify(loaded.model, loaded.name, loaded.revision)
    return cached_calibration(loaded, identity, quick_settings(loaded, seed, tuning=True))


def default_criterion(calibration: Calibration) -> str:
    """Return the method of plans that are not tuned: what loses least of those collected."""
    return "wina" if calibration.statistics[0].gradient_rms is None else "loss"


def quick_settings(loaded: LoadedModel, seed: int, tuning: bool = False) -> CalibrationSettings:
    """Return settings for a calibration on the way: small where there is no GPU.

    With the held-out text they make whole pieces of the default text.
    """
    cuda = loaded.model.device.type == "cuda"
    if tuning and cuda:
        return CalibrationSettings(tokens=253_952, statistics_tokens=32_768, seed=seed)
    if tuning:
        return CalibrationSettings(tokens=28_672, statistics_tokens=8_192, seed=seed)
    return CalibrationSettings(tokens=14_336 if cuda else 3_584, seed=seed)


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


def numbers(text: str, option: str, kind: Callable[[str], Number]) -> list[Number]:
    """Return the numbers of an option that takes several, separated by commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes numbers separated by commas; got {text!r}") from None


def command_line(context: typer.Context) -> str:
    """Return the command that was given, with the options that are not at their defaults."""
    words = ["wina", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value in (parameter.default, None, (), []) or parameter.name == "as_json":
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            words += map(str, values)
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            name = max(parameter.opts, key=len)
            words += [word for one in values for word in (name, str(one))]
    return shlex.join(words)


def decode_mode(compile_step: bool | None) -> Mode:
    """Return the decoder's mode for --compile, --no-compile or neither."""
    return "auto" if compile_step is None else "compiled" if compile_step else "eager"


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on standard output; what is not finite becomes null."""
    typer.echo(to_json(content, inf_nan_mode="null").decode())
