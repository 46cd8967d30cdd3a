import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers import Cli, english, make_tokenizer
from wina.calibration import Calibration, CalibrationSettings, FileText, calibrate, make_plan
from wina.errors import UsageError, WinaError
from wina.evaluation import Limits, limit_windows, recommend
from wina.evaluation.bounds import divergence, perplexity_increase, student_t
from wina.evaluation.recommend import measure_loss
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


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Text of another kind than the calibration's."""
    letters = random.Random(0).choices("0123456789+-*/=()[]{}<>#$%&@ \n", k=4_000)
    path = tmp_path / "noise.txt"
    path.write_text("".join(letters), encoding="utf-8")
    return path


def test_windows_for_a_limit_are_spread_over_the_text(loaded: PreTrainedModel, noise: Path) -> None:
    tokenizer = make_tokenizer()
    long = noise.with_name("long.txt")
    long.write_text(english(100_000), encoding="utf-8")
    windows = limit_windows(loaded, tokenizer, long, 4)
    assert (len(windows), {tuple(x.shape) for x in windows}) == (32, {(1, 256)})
    ids = tokenizer(english(100_000))["input_ids"]
    every = [ids[first : first + 256] for first in range(0, len(ids) - 255, 256)]
    places = [every.index(x[0].tolist()) for x in windows]
    gaps = {b - a for a, b in pairwise(places)}
    assert max(gaps) - min(gaps) <= 1
    assert places[0] < max(gaps)
    assert places[-1] >= len(every) - max(gaps)
    assert len(limit_windows(loaded, tokenizer, noise, 4)) < 32
    noise.write_text(english(1_000), encoding="utf-8")
    with pytest.raises(WinaError, match=r"noise\.txt makes \d windows, too few"):
        limit_windows(loaded, tokenizer, noise, 4)


def test_the_limit_is_kept_on_each_text(
    qwen3: Path, loaded: PreTrainedModel, noise: Path, text: Path, tmp_path: Path, cli: Cli
) -> None:
    folder, out = tmp_path / "calibration", tmp_path / "plan"
    made = calibrate(
        loaded,
        make_tokenizer(),
        FileText((text,)),
        CalibrationSettings(tokens=3072, context=64, dense_prefix=4),
        name=str(qwen3),
        output=folder,
    )
    windows = limit_windows(loaded, make_tokenizer(), noise, 4)
    half = measure_loss(loaded, make_plan(made, 0.3, "wina", "uniform"), windows, 4)
    command = ("plan", folder, "--max-kl", half.kl.upper, "--method", "wina", "--model", qwen3)
    command = (*command, "--allocation", "uniform", "-o", out, "--json")
    alone = json.loads(cli(*command).out)
    both = json.loads(cli(*command, "--limit-text", noise).out)
    assert list(alone["losses"]) == ["held-out text"]
    assert list(both["losses"]) == ["held-out text", "noise.txt"]
    assert all(loss["kl"]["upper"] <= half.kl.upper for loss in both["losses"].values())
    loss = both["losses"]["noise.txt"]
    plan = Plan.load(out)
    again = measure_loss(loaded, plan, windows, 4)
    assert loss["kl"]["estimate"] == pytest.approx(again.kl.estimate)
    # The noise decides, one way or the other: a step more is beyond the limit on one of the texts.
    target = both["target_sparsity"]
    assert target <= alone["target_sparsity"]
    more = make_plan(made, target + 0.01, "wina", "uniform")
    held_out = made.windows(held_out=True)
    losses = [measure_loss(loaded, more, x, 4) for x in (windows, held_out)]
    assert any((x.kl.upper or 0) > half.kl.upper for x in losses)

    done = cli(*command, "--limit-text", text)
    assert (done.code, "calibration has read" in done.said) == (2, True)
    done = cli("plan", folder, "--limit-text", noise, "--model", qwen3)
    assert (done.code, "--limit-text needs" in done.said) == (2, True)
    done = cli(*command, "--limit-text", tmp_path / "none.txt")
    assert (done.code, "no text file" in done.said) == (2, True)
