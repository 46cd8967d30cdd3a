"""The way through calibration: tokens, gradients, scores, verdict; each streams and resumes.

The work in progress lives in a folder beside the result: the tokens so far and the sums so far,
saved every few seconds. A killed calibration started again with the same settings goes on where
it was, adds the same windows in the same order, and so gives the same numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.allocation.build import versions
from wina.calibration.artifact import (
    DOCUMENT,
    TOKENS,
    Calibration,
    CalibrationDocument,
    SiteRecord,
    window_ids,
)
from wina.calibration.collect import (
    Sums,
    add_gradients,
    add_scores,
    collectable,
    column_norms,
    gradient_checkpointed,
    gradient_rms,
    to_statistics,
)
from wina.calibration.planning import judge
from wina.calibration.text import TextSource, default_text
from wina.criteria import LinearFacts
from wina.errors import UsageError, WinaError
from wina.files import check_replaceable, read_tensors, work_folder, write_tensors, write_text
from wina.layers import phase_of, widened
from wina.models import (
    Site,
    called_sites,
    check_supported,
    context_limit,
    find_sites,
    identify,
    start_ids,
)
from wina.progress import bar, note, track
from wina.statistics import LinearStatistics, experts

PROGRESS, MARKER = "progress.safetensors", "tokens.json"
SECONDS = 5.0  # between two saves of the sums
LEAST_TOKENS = 512


@dataclass(frozen=True)
class CalibrationSettings:
    """How much text is read and how.

    Attributes:
        tokens: of calibration text; an eighth more (at most 8,192) is held out after them.
        context: positions of a window.
        statistics_tokens: at most so many of the tokens, evenly spread, are read for gradients
            and scores; more text than that is of use to tuning.
        dense_prefix: first positions of a window that are not counted.
        seed: of the model's own text.
        gradient: collect gradients too (criterion loss and allocation global need them).
        verdict: measure uniform against global allocation at 50 % on the held-out text.
    """

    tokens: int = 16_384
    context: int = 2_048
    statistics_tokens: int = 65_536
    dense_prefix: int = 20
    seed: int = 0
    gradient: bool = True
    verdict: bool = True

    def __post_init__(self) -> None:
        if self.tokens < LEAST_TOKENS:
            raise UsageError(f"calibration needs at least {LEAST_TOKENS} tokens")
        if self.statistics_tokens < 1:
            raise UsageError("calibration needs at least one token of statistics")
        if not 0 <= self.dense_prefix < self.context - 1:
            raise UsageError("the dense prefix must be shorter than the context")

    @property
    def held_out(self) -> int:
        """Number of held-out tokens wanted."""
        return min(8_192, max(LEAST_TOKENS // 2, self.tokens // 8))


def calibrate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    source: TextSource | None = None,
    settings: CalibrationSettings | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    output: str | Path | None = None,
) -> Calibration:
    """Collect the statistics from which plans are made.

    Args:
        model: a dense causal language model in evaluation mode.
        tokenizer: its tokenizer.
        source: the text; None is ``default_text``.
        settings: how much and how.
        name: of the model, for records; None is what it was loaded from.
        revision: of the model, for records.
        output: folder to write; what is under way is kept beside it. None keeps nothing.

    Raises:
        UsageError: unsupported architecture or settings.
        WinaError: too little text, or a model whose activations are not finite.
    """
    settings = settings or CalibrationSettings()
    if model.training or phase_of(model) is not None:
        raise UsageError(
            "calibration needs the dense model in evaluation mode: call wina.densify(model) and "
            "model.eval() first"
        )
    if output is not None:
        check_replaceable(Path(output), DOCUMENT)
    source = source or default_text(settings.seed)
    sites = _sites(model)
    start = start_ids(model, tokenizer)
    identity = identify(model, name or model.config.name_or_path, revision)
    fingerprint = json.dumps(
        {
            "model": identity.model_dump(),
            "source": source.describe(),
            "settings": asdict(settings),
            "start": start,
        }
    )
    _window(model, settings, start, settings.held_out)
    with widened(model), work_folder(output, fingerprint, (PROGRESS, MARKER, TOKENS)) as folder:
        tokens, count = _tokens(model, tokenizer, source, start, settings, folder)
        held_out = min(settings.held_out, max(count - settings.tokens, count // 8))
        calibration_tokens = min(settings.tokens, count - held_out)
        window = _window(model, settings, start, held_out)
        stride = window * math.ceil(calibration_tokens / settings.statistics_tokens)
        offsets = range(0, calibration_tokens - window + 1, stride)
        state = _State.load(folder, model.device)
        norms = column_norms(model, sites)

        def windows(first: int, what: str) -> Iterator[tuple[int, Tensor]]:
            todo = list(enumerate(offsets))[first:]
            for number, offset in track(todo, what, len(offsets), first):
                yield number, window_ids(tokens, start, offset, window).to(model.device)

        skip = settings.dense_prefix
        if settings.gradient and state.stage == "gradients":
            with gradient_checkpointed(model):
                for number, ids in windows(state.done, "gradients"):
                    add_gradients(model, sites, ids, skip, state.sums)
                    state.step(number + 1)
        if state.stage == "gradients":
            state.finish_stage("scores")
        if settings.gradient:
            sites = _reached(sites, state.sums)

        gradients = gradient_rms(sites, state.sums)
        facts = {
            site.name: LinearFacts(site.kind, norms[site.name], gradients[site.name])
            for site in sites
        }
        scales = {
            criterion.name: {name: criterion.scale(fact) for name, fact in facts.items()}
            for criterion in collectable(settings.gradient)
        }
        for number, ids in windows(state.done, "scores"):
            add_scores(model, sites, scales, ids, skip, state.sums)
            state.step(number + 1)

        document = CalibrationDocument(
            model=identity,
            source=source.describe(),
            tokens=calibration_tokens,
            held_out=held_out,
            window=window,
            start=start,
            dense_prefix=skip,
            seed=settings.seed,
            linears=[SiteRecord(**asdict(site)) for site in sites],
            versions=versions(),
        )
        # Mapped, not read: memory does not grow with the text.
        used = tokens[: calibration_tokens + held_out]
        statistics = to_statistics(sites, norms, state.sums)
        _report_experts(statistics, int(state.sums["tokens/scores"]))
        calibration = Calibration(document, statistics, used)
        if settings.gradient and settings.verdict:
            verdict = judge(calibration, model)
            document = document.model_copy(update={"verdict": verdict})
            calibration = Calibration(document, calibration.statistics, used)
        if output is None:
            return replace(calibration, tokens=np.array(used))
        calibration.save(output)
    return Calibration.load(output)


def _sites(model: PreTrainedModel) -> list[Site]:
    """Return the blocks' linears, and the head where it is a linear."""
    check_supported(model)
    try:
        sites = find_sites(model, include_head=True)
    except UsageError:
        sites = find_sites(model)
    called = called_sites(model, sites)
    if len(called) < len(sites):
        left = [site.name for site in sites if site not in called]
        note(f"no forward pass calls {left[0]} and {len(left) - 1} others: they stay dense")
    return called


def _reached(sites: list[Site], sums: Sums) -> list[Site]:
    """Return the linears that gradients reach, and those of experts, which lean on each other.

    What only chooses (the index of a sparse attention) has no gradient, so that nothing says what
    dropping its inputs costs.
    """
    left = [x for x in sites if x.expert is None and f"gradient/{x.name}" not in sums]
    if left:
        note(f"no gradient reaches {left[0].name} and {len(left) - 1} others: they stay dense")
    return [site for site in sites if site not in left]


def _report_experts(statistics: Sequence[LinearStatistics], tokens: int) -> None:
    """Say how many experts few tokens were routed to."""
    routed = [
        x.usage * tokens
        for x in statistics
        if x.site.expert is not None and x.site.name.endswith(".down_proj")
    ]
    few = sum(count < experts.PRIOR for count in routed)
    if few:
        note(
            f"{few} of {len(routed)} experts saw fewer than {experts.PRIOR:.0f} of {tokens} tokens "
            f"({routed.count(0.0)} none) and lean on their layer's statistics; "
            "more --tokens tell them apart"
        )


def _window(
    model: PreTrainedModel, settings: CalibrationSettings, start: list[int], held_out: int
) -> int:
    """Return the tokens of a window; raise UsageError if the dense prefix leaves none to count."""
    limit = context_limit(model)
    context = min(settings.context, limit or settings.context)
    window = min(context - len(start), held_out)
    # The last position has no next token.
    if len(start) + window <= settings.dense_prefix + 1:
        raise UsageError(
            f"a dense prefix of {settings.dense_prefix} leaves nothing to count of windows of "
            f"{len(start) + window} positions"
        )
    return window


def _tokens(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    source: TextSource,
    start: list[int],
    settings: CalibrationSettings,
    folder: Path,
) -> tuple[NDArray[np.uint32], int]:
    """Return the token file of a folder, written as far as the text goes, and its length."""
    wanted = settings.tokens + settings.held_out
    path, marker = folder / TOKENS, folder / MARKER
    done = {"pieces": 0, "tokens": 0, "complete": False}
    if path.exists() and marker.exists():
        done = json.loads(marker.read_text())
    if not path.exists() or not (source.resumable or done["complete"]):
        done = {"pieces": 0, "tokens": 0, "complete": False}
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=(wanted,)).flush()
    tokens = np.lib.format.open_memmap(path, mode="r+")
    if not done["complete"]:
        pieces = source.pieces(model, tokenizer, start, int(done["pieces"]))
        with bar("reading text", wanted, int(done["tokens"])) as advance:
            for piece in pieces:
                first = int(done["tokens"])
                ids = np.asarray(piece[: wanted - first], dtype=np.uint32)
                tokens[first : first + len(ids)] = ids
                tokens.flush()
                done = {
                    "pieces": int(done["pieces"]) + 1,
                    "tokens": first + len(ids),
                    "complete": False,
                }
                if source.resumable:
                    write_text(marker, json.dumps(done))
                advance(len(ids))
                if done["tokens"] == wanted:
                    break
        done["complete"] = True
        write_text(marker, json.dumps(done))
    count = int(done["tokens"])
    if count < LEAST_TOKENS:
        raise WinaError(
            f"the calibration text has {count} tokens, and at least {LEAST_TOKENS} are needed"
        )
    if count < wanted:
        note(f"the text ends after {count} of {wanted} tokens")
    return tokens, count


@dataclass
class _State:
    """The sums so far and where they stand: ``done`` windows of ``stage``."""

    folder: Path
    stage: str
    done: int
    sums: Sums
    saved: float

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> _State:
        path = folder / PROGRESS
        if not path.exists():
            return cls(folder, "gradients", 0, {}, time.monotonic())
        tensors, metadata = read_tensors(path)
        sums = {name: tensor.to(device) for name, tensor in tensors.items()}
        return cls(folder, metadata["stage"], int(metadata["done"]), sums, time.monotonic())

    def step(self, done: int) -> None:
        """Note that a window is in the sums, and save them now and then."""
        self.done = done
        if time.monotonic() - self.saved > SECONDS:
            self.save()

    def finish_stage(self, following: str) -> None:
        """Go to the next stage."""
        self.stage, self.done = following, 0
        self.save()

    def save(self) -> None:
        """Write sums and place in one file, whole or not at all."""
        metadata = {"stage": self.stage, "done": str(self.done)}
        write_tensors(self.folder / PROGRESS, self.sums, metadata)
        self.saved = time.monotonic()
