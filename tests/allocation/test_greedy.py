from contextlib import nullcontext

import pytest
import torch
from transformers import PreTrainedModel

import wina
from tests.helpers import prompt
from tests.layers.test_swap import assert_same, fingerprint
from wina.allocation import allocate_greedily
from wina.allocation.greedy import MOST
from wina.criteria import criteria
from wina.layers.linear import SparseLayer
from wina.statistics import LinearStatistics


def statistics_of(model: PreTrainedModel, head: bool = False) -> list[LinearStatistics]:
    from tests.helpers import make_tokenizer
    from wina.calibration import CalibrationSettings, calibrate

    settings = CalibrationSettings(tokens=512, context=64, dense_prefix=4, gradient=False)
    return calibrate(model, make_tokenizer(), settings=settings).linears(head)


def by_block(statistics: list[LinearStatistics], shares: torch.Tensor) -> dict[int, float]:
    found: dict[int, float] = {}
    for block in {x.site.block for x in statistics if x.site.block is not None}:
        inside = [i for i, x in enumerate(statistics) if x.site.block == block]
        weights = torch.tensor([float(statistics[i].site.weights) for i in inside]).double()
        found[block] = float((shares[inside] * weights).sum() / weights.sum())
    return found


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_every_block_meets_the_budget(
    model: PreTrainedModel, selection: str, target: float
) -> None:
    statistics = statistics_of(model)
    before = fingerprint(model)
    shares = allocate_greedily(
        model,
        prompt(40),
        statistics,
        criteria.get("wina"),
        selection,  # type: ignore[arg-type]
        target,
        4,
    )
    assert by_block(statistics, shares) == pytest.approx({0: target, 1: target}, abs=1e-3)
    assert (shares <= MOST + 1e-9).all()
    assert len(set(shares.tolist())) > 1
    assert_same(fingerprint(model), before)


def test_no_linear_goes_beyond_the_most_even_if_the_budget_is_missed(
    model: PreTrainedModel,
) -> None:
    statistics = statistics_of(model)
    shares = allocate_greedily(
        model, prompt(40), statistics, criteria.get("wina"), "threshold", 0.98, 4
    )
    assert shares.tolist() == pytest.approx([MOST] * len(statistics))


def test_what_does_not_matter_is_dropped_first(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.o_proj").weight.zero_()
    statistics = statistics_of(model)
    shares = allocate_greedily(
        model, prompt(40), statistics, criteria.get("teal"), "threshold", 0.3, 4
    )
    attention = {
        x.site.kind: float(share)
        for x, share in zip(statistics, shares, strict=True)
        if x.site.block == 0
    }
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert attention[kind] > max(attention[kind] for kind in ("gate_proj", "down_proj"))


def test_the_head_gets_the_target(model: PreTrainedModel) -> None:
    statistics = statistics_of(model, head=True)
    shares = allocate_greedily(
        model, prompt(40), statistics, criteria.get("wina"), "threshold", 0.4, 4
    )
    assert statistics[-1].site.block is None
    assert shares[-1] == 0.4


def test_it_works_through_a_plan_on_every_family(each_model: PreTrainedModel) -> None:
    from tests.helpers import make_tokenizer

    calibration = wina.calibrate(each_model, make_tokenizer(), tokens=512, context=64)
    plan = calibration.plan(0.5, allocation="greedy", model=each_model)
    assert plan.sparsity == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize("basis", [False, True])
def test_what_is_not_computed_again_changes_nothing(
    each_model: PreTrainedModel,
    selection: str,
    basis: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wina.allocation import greedy
    from wina.calibration.rotated import find_bases, in_bases

    statistics = statistics_of(each_model)

    def search() -> tuple[torch.Tensor, int]:
        counter = MaskCounter(monkeypatch)
        args = (each_model, prompt(40), statistics, criteria.get("wina"), selection, 0.4, 4)
        with in_bases(each_model, find_bases(each_model, "svd")) if basis else nullcontext():
            return allocate_greedily(*args), counter.count  # type: ignore[arg-type]

    found, masks = search()
    monkeypatch.setattr(greedy._Replay, "start", lambda _: nullcontext())
    wanted, more = search()
    assert found.equal(wanted)
    assert masks < 0.75 * more


class MaskCounter:
    """Counts the masks that sparse layers compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def mask(layer: SparseLayer, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return before(layer, x)

        before = SparseLayer.__dict__["mask"]
        monkeypatch.setattr(SparseLayer, "mask", mask)
