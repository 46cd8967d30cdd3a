from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers import Cli, english, make_tokenizer
from wina.calibration import Calibration, make_plan
from wina.errors import UsageError, WinaError
from wina.evaluation import Limits, recommend
from wina.evaluation.bounds import divergence, perplexity_increase, student_t
from wina.measures import Totals, score_plan
from wina.models import load_model
from wina.plan import Plan

Calibrated = tuple[Path, Calibration]


@pytest.fixture
def loaded(qwen3: Path) -> PreTrainedModel:
    return load_model(str(qwen3)).model


@pytest.mark.parametrize(
    ("probability", "freedom", "wanted"),  # from printed tables of the distribution
    [
        (0.95, 4, 2.1318),
        (0.95, 7, 1.8946),
        (0.95, 15, 1.7531),
        (0.95, 100, 1.6602),
        (0.80, 4, 0.9410),
        (0.80, 15, 0.8662),
    ],
)
def test_student_t_is_close_to_the_exact_quantile(
    probability: float, freedom: int, wanted: float
) -> None:
    assert student_t(probability, freedom) == pytest.approx(wanted, rel=0.005)


def windows(count: int, seed: int, size: int = 100) -> list[Totals]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator) * 0.05 + 0.1
    return [
        Totals(size, nll=size * (2.0 + float(x)), dense_nll=size * 2.0, divergence=size * float(x))
        for x in noise
    ]


def test_the_bound_covers_the_truth_as_often_as_it_says() -> None:
    held = [divergence(windows(8, seed)).upper or 0.0 for seed in range(400)]
    covered = sum(upper >= 0.1 for upper in held) / len(held)
    assert 0.91 <= covered <= 0.98


def test_the_increase_is_paired_with_dense() -> None:
    found = perplexity_increase(windows(10, 0))
    hard = windows(10, 0)
    for place, one in enumerate(hard):
        one.nll += 50.0 * place  # a hard window is hard for both
        one.dense_nll += 50.0 * place
    again = perplexity_increase(hard)
    assert again.estimate == pytest.approx(found.estimate)
    assert again.upper == pytest.approx(found.upper)
    assert perplexity_increase(windows(4, 0)).upper is None


def test_the_recommended_plan_is_the_highest_that_holds(
    calibration: Calibrated, loaded: PreTrainedModel
) -> None:
    made = calibration[1]
    text = made.windows(held_out=True, length=20)
    assert len(text) >= 5

    def plan_at(sparsity: float) -> Plan:
        return make_plan(made, sparsity, "wina", "uniform")

    half, _ = score_plan(loaded, plan_at(0.5), text, 4, "")
    limits = Limits(kl=half.kl)  # its bound is above its estimate: less than a half must come out
    found = recommend(loaded, plan_at, {"text": text}, limits, dense_prefix=4)
    target = found.plan.document.target_sparsity
    assert 0 < target < 0.5
    assert found.tried[target]
    above = [one for one in found.tried if one > target]
    assert above
    assert not any(found.tried[one] for one in above)
    loss = found.losses["text"]
    assert loss.within(limits)
    assert found.plan.document.realized_sparsity == loss.sparsity
    with pytest.raises(WinaError, match="no sparsity"):
        recommend(loaded, plan_at, {"text": text}, Limits(kl=1e-12), dense_prefix=4)
    with pytest.raises(WinaError, match="give more text"):
        recommend(loaded, plan_at, {"text": text[:2]}, limits, dense_prefix=4)


def test_limits_are_checked() -> None:
    with pytest.raises(UsageError, match="above 0"):
        Limits(kl=0.0)
    with pytest.raises(UsageError, match="give a limit"):
        Limits()


def test_plan_finds_the_sparsity_for_a_limit(
    calibration: Calibrated, qwen3: Path, tmp_path: Path, cli: Cli
) -> None:
    arguments = ("plan", calibration[0], "--max-perplexity-increase")
    done = cli(*arguments, "many", "-o", tmp_path / "p")
    assert (done.code, "such as 2% or 0.02" in done.said) == (2, True)
    done = cli(*arguments, "2%", "-o", tmp_path / "p")
    assert (done.code, "add --model" in done.said) == (2, True)


def test_the_limit_holds_on_texts_that_were_not_used(
    calibration: Calibrated, loaded: PreTrainedModel
) -> None:
    """Bisection on one text; what it found is then scored on three others."""
    made = calibration[1]
    pieces = english(60_000)
    ids = make_tokenizer()(pieces)["input_ids"]
    parts = [torch.tensor([ids[first : first + 40]]) for first in range(0, len(ids) - 40, 40)]
    used, *others = (parts[start::4][:60] for start in range(4))

    def plan_at(sparsity: float) -> Plan:
        return make_plan(made, sparsity, "wina", "uniform")

    for limits in (Limits(kl=0.02), Limits(kl=0.1)):
        found = recommend(loaded, plan_at, {"used": used}, limits, dense_prefix=4)
        for text in others:
            totals, _ = score_plan(loaded, found.plan, text, 4, "")
            assert totals.kl <= (limits.kl or 0)
        # And not because hardly anything is dropped: a step more is beyond it.
        target = found.plan.document.target_sparsity
        assert target > 0.05
        more, _ = score_plan(loaded, plan_at(target + 0.1), used, 4, "")
        assert more.kl > (limits.kl or 0)
