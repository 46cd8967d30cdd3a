"""vLLM at 50 % beside Transformers, position by position on identical prefixes.

A sparse model is discontinuous: where a channel lies within rounding of its threshold, the last bit
of x decides whether it is kept, and one more or less changes the next layers' inputs by far more
than rounding. So two correct programs write different texts after a while. What can be asked is
that they agree to rounding up to the first such place, that every difference begins with a channel
at its threshold, and that there are no more of them than Transformers has with itself, its inputs
perturbed by as much as the two programs' dense logits differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.vllm import reference
from tests.integrations.vllm.conftest import Served, needs_vllm, with_plan
from tests.integrations.vllm.engine import FLOAT32, Forced, generate
from wina.plan import Plan

pytestmark = needs_vllm
TOKENS, STEPS, FEW = 64, 8, 8
ROUNDING = 5e-4  # of a logit; what dense logits differ by is printed
NOISE = 2e-7  # relative, of the control; one unit in float32's last place is 0.6e-7 to 1.2e-7
CALLS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass
class Said:
    """The best token at each position, and some of the logits: (texts, positions[, some])."""

    best: Tensor
    logits: Tensor

    def apart(self, other: Said) -> Tensor:
        """Return the largest difference of a logit at each position, (texts, positions)."""
        return (self.logits - other.logits).abs().amax(-1)

    def agree(self, other: Said) -> float:
        """Return the share of sparse positions, all but each text's first, with the same token."""
        return float((self.best == other.best)[:, 1:].float().mean())


@dataclass
class Compared:
    """Transformers' answers, and what it says on them in whole and in rounds of a few steps."""

    answers: Tensor  # TOKENS + 1 of each prompt
    whole: Said
    control: Said
    parts: list[Forced]
    short: Said
    inputs: list[list[Tensor]]  # of the first FEW texts: by position, then layer and call


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """All cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def transformers(served: Served, prompts: list[list[int]], threads: None) -> Compared:
    model: Any = served.loaded.model
    ends = [reference.prefill(model, ids) for ids in prompts]
    logits, caches = torch.stack([x[-1] for x, _ in ends]), [cache for _, cache in ends]
    whole = Said(*reference.decode(model, caches, logits, None, TOKENS + 1))
    answers = whole.best
    with reference.noise(model, NOISE):
        control = Said(*reference.decode(model, caches, logits, answers, TOKENS + 1))
    rounds, short = [], []
    for ids, answer in zip(prompts, answers.tolist(), strict=True):
        logits, cache = reference.prefill(model, ids + answer[:TOKENS])
        starts = range(0, TOKENS, STEPS)
        parts = [reference.cut(cache, len(ids) + start) for start in starts]
        forced = [answer[start : start + STEPS + 1] for start in starts]
        first = torch.stack([logits[len(ids) + start - 1] for start in starts])
        rounds.append(Forced([ids + answer[:start] for start in starts], forced))
        short.append((parts, first, forced))
    together = []
    for place in range(0, len(short), 8):
        some = short[place : place + 8]
        caches = [cache for parts, _, _ in some for cache in parts]
        first = torch.cat([logits for _, logits, _ in some])
        forced = torch.tensor([tokens for _, _, all_forced in some for tokens in all_forced])
        together.append(reference.decode(model, caches, first, forced, STEPS + 1))
    best, kept = (torch.cat(x) for x in zip(*together, strict=True))
    names = [
        f"model.layers.{block}.{call}"
        for block in range(model.config.num_hidden_layers)
        for call in CALLS
    ]
    ends = [reference.prefill(model, ids) for ids in prompts[:FEW]]
    with reference.inputs(model, names) as seen:
        reference.decode(
            model,
            [cache for _, cache in ends],
            torch.stack([x[-1] for x, _ in ends]),
            answers[:FEW],
            TOKENS + 1,
        )
    inputs = [[seen[name][place] for name in names] for place in range(TOKENS)]
    return Compared(answers, whole, control, rounds, Said(best, kept), inputs)


def ask(
    served: Served, prompts: list[list[int]], found: Compared, file: Path, broken: bool = False
) -> tuple[Said, Said, list[list[Tensor]]]:
    """Return what vLLM says on the same tokens: in whole, in rounds of a few steps; and inputs."""
    few = 8 if broken else len(prompts)
    answers = found.answers.tolist()[:few]
    parts = found.parts[:few]
    short = Forced([x for y in parts for x in y.prompts], [x for y in parts for x in y.tokens])
    forced = [Forced(prompts[:few], answers), short, Forced(prompts[:FEW], answers[:FEW])]
    options = {**FLOAT32, "max_num_seqs": 64, **with_plan(served.plan), "broken": broken}
    generate(served.model, [], forced=forced, keep=str(file), **options)
    kept = torch.load(file)
    whole, short_said, _ = (Said(*said) for said in kept["said"])
    calls = len(found.inputs[0])
    inputs = kept["inputs"]
    assert len(inputs) == TOKENS * calls
    return whole, short_said, [inputs[x : x + calls] for x in range(0, len(inputs), calls)]


@pytest.fixture(scope="module")
def vllm(
    served: Served,
    prompts: list[list[int]],
    transformers: Compared,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Said, Said, list[list[Tensor]]]:
    return ask(served, prompts, transformers, tmp_path_factory.mktemp("kept") / "kept")


def first_jump(apart: Tensor) -> Tensor:
    """Return the first position of each text that is far off, or their number."""
    far = apart > ROUNDING
    return torch.where(far.any(1), far.int().argmax(1), far.shape[1])


def report(name: str, apart: Tensor, agree: float) -> None:
    jumps = first_jump(apart)
    before = torch.arange(apart.shape[1])[None] < jumps[:, None]
    print(
        f"\n{name}: the same best token at {agree:.1%} of {apart[:, 1:].numel()} positions; "
        f"first jump at position {jumps.float().mean():.1f} in the mean; "
        f"before it logits differ by {apart[before].median():.1e} (median), after by "
        f"{apart[~before].median():.2f}",
        end="",
    )


def faults(short: Said, wanted: Said) -> list[str]:
    """Return what rounding does not explain in rounds of a few steps after a dense prefix."""
    apart, found = short.apart(wanted)[: len(short.best)], []
    if float(apart[:, 0].max()) > ROUNDING:
        found.append("dense positions differ")
    if (share := float((apart[:, 1] < ROUNDING).float().mean())) < 0.75:
        found.append(f"only {share:.1%} of first sparse positions agree to rounding")
    if (share := short.agree(wanted)) < 0.95:
        found.append(f"only {share:.1%} of tokens are the same")
    before = torch.arange(apart.shape[1])[None] < first_jump(apart)[:, None]
    if wrong := int((before & (short.best != wanted.best)).sum()):
        found.append(f"{wrong} tokens differ where logits agree to rounding")
    return found


def test_steps_from_a_dense_prefix(vllm: Any, transformers: Compared) -> None:
    """Each of the 64 x 64 positions, at most 8 sparse steps after a common dense prefix."""
    _, short, _ = vllm
    apart = short.apart(transformers.short)
    report("at most 8 steps", apart, short.agree(transformers.short))
    first = float((apart[:, 1] < ROUNDING).float().mean())
    print(f"; {first:.1%} of {len(apart)} first sparse positions agree to rounding")
    assert faults(short, transformers.short) == []


def test_a_wrong_shard_is_seen(
    served: Served, prompts: list[list[int]], transformers: Compared, tmp_path: Path
) -> None:
    _, short, _ = ask(served, prompts, transformers, tmp_path / "kept", broken=True)
    wanted = Said(transformers.short.best[: len(short.best)], transformers.short.logits)
    wanted.logits = wanted.logits[: len(short.best)]
    seen = faults(short, wanted)
    print(f"\nthresholds of one k_proj of 30 times 1.5: {seen}")
    assert any("first sparse positions" in fault for fault in seen)


def test_whole_answers(vllm: Any, transformers: Compared) -> None:
    """No more differences than Transformers has with itself for as much noise."""
    whole, _, _ = vllm
    wanted, control = transformers.whole, transformers.control
    ours, theirs = whole.apart(wanted), control.apart(wanted)
    report("vLLM", ours, whole.agree(wanted))
    report("control", theirs, control.agree(wanted))
    typical = [float(x[:, 1:3].median()) for x in (ours, theirs)]
    print(f"\nat the first two sparse positions: {typical[0]:.1e}, control {typical[1]:.1e}")
    assert typical[1] <= 1.1 * typical[0]  # the control is given no more noise than was measured
    wrong = [(said.best != wanted.best).float().sum(1) for said in (whole, control)]
    texts = [float((x == 0).float().mean()) for x in wrong]
    print(f"texts without a difference: {texts[0]:.1%}, control {texts[1]:.1%}")
    more = wrong[0] - wrong[1]
    error = float(more.std()) * len(more) ** 0.5
    print(
        f"positions that differ: {wrong[0].sum():.0f}, control {wrong[1].sum():.0f} ± {error:.0f}"
    )
    assert float(more.sum()) <= 3 * error
    before = torch.arange(ours.shape[1])[None] < first_jump(ours)[:, None]
    assert bool((whole.best == wanted.best)[before].all())


def test_differences_begin_at_a_threshold(
    vllm: Any, transformers: Compared, served: Served
) -> None:
    """Masks are the same up to the first channel that lies within rounding of its threshold."""
    plan = Plan.load(served.plan)
    _, _, ours = vllm
    thresholds = [
        torch.stack([plan.vectors[name] for name in names])
        for block in range(len(ours[0]) // len(CALLS))
        for names in (
            [f"model.layers.{block}.{call.rpartition('.')[0]}.{one}" for one in group]
            for call, group in zip(CALLS, GROUPS, strict=True)
        )
    ]
    margins, noises, kept = [], [], 0
    for text in range(FEW):
        done = False
        for mine, theirs in zip(ours, transformers.inputs, strict=True):
            for x, y, limits in zip(mine, theirs, thresholds, strict=True):
                a, b = x[text], y[text]
                other = (a.abs() < limits) != (b.abs() < limits)
                scale = float(b.square().mean().sqrt())
                if done := bool(other.any()):
                    gaps = ((b.abs() - limits).abs() / scale)[other]
                    margins.append(float(gaps.max()))
                    break
                noises.append(float((a - b).abs().max()) / scale)
                kept += int((a.abs() >= limits).sum())
            if done:
                break
    print(
        f"\n{len(margins)} of {FEW} texts: the first channel kept by one only is at most "
        f"{max(margins):.1e} of its layer's rms from its threshold; before it {kept} channels kept "
        f"by both and none by one, inputs apart by {max(noises):.1e} of their rms at most"
    )
    assert max(margins) < 1e-4
    assert max(noises) < 3e-4
