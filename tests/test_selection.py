import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wina.errors import UsageError
from wina.selection import (
    channels_kept,
    check_selection,
    check_sparsity,
    threshold_mask,
    topk_mask,
)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_topk_keeps_exactly_k_and_the_largest(width: int, keep: int, seed: int) -> None:
    keep = min(keep, width)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, width, generator=generator)
    scale = torch.rand(width, generator=generator) + 0.1
    mask = topk_mask(x, scale, keep)
    assert (mask.sum(-1) == keep).all()
    scores = x.abs() * scale
    worst_kept = scores.masked_fill(~mask, torch.inf).amin(-1)
    best_dropped = scores.masked_fill(mask, -torch.inf).amax(-1)
    assert (worst_kept >= best_dropped).all()


@given(st.integers(2, 40), st.data(), st.integers(0, 2**31))
def test_a_threshold_between_kth_and_next_score_is_topk(
    width: int, data: st.DataObject, seed: int
) -> None:
    keep = data.draw(st.integers(1, width - 1))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(width, generator=generator)
    scale = torch.rand(width, generator=generator) + 0.1
    ordered = (x.abs() * scale).sort(descending=True).values
    tau = (ordered[keep - 1].double() + ordered[keep].double()) / 2
    # Tied or all but tied scores have no float32 threshold between them.
    if ordered[keep - 1] - ordered[keep] > 1e-5:
        assert torch.equal(threshold_mask(x, (tau / scale).float()), topk_mask(x, scale, keep))


def test_threshold_zero_drops_nothing_and_infinity_everything_finite() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -5.0])
    assert threshold_mask(x, torch.zeros(4)).all()
    assert not threshold_mask(x, torch.full((4,), torch.inf)).any()


def test_equal_to_the_threshold_stays() -> None:
    x = torch.tensor([0.5, -0.5, 0.49])
    assert threshold_mask(x, torch.full((3,), 0.5)).tolist() == [True, True, False]


def test_nan_is_never_hidden() -> None:
    x = torch.tensor([[float("nan"), 3.0, 2.0]])
    assert threshold_mask(x, torch.full((3,), torch.inf))[0, 0]
    assert topk_mask(x, torch.ones(3), 1).tolist() == [[True, False, False]]


def test_masks_compare_in_float32() -> None:
    # 1 + 2^-10 is not a bfloat16 number: in bfloat16 the threshold would round down to 1.
    x = torch.ones(1, dtype=torch.bfloat16)
    assert not threshold_mask(x, torch.tensor([1 + 2**-10])).any()


@pytest.mark.parametrize(
    ("width", "sparsity", "kept"), [(10, 0.0, 10), (10, 0.5, 5), (7, 0.5, 4), (3, 0.99, 0)]
)
def test_channels_kept(width: int, sparsity: float, kept: int) -> None:
    assert channels_kept(width, sparsity) == kept


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), float("inf"), 50])
def test_sparsity_outside_the_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        check_sparsity(sparsity)


def test_sparsity_inside_the_range_passes() -> None:
    assert check_sparsity(0) == 0.0
    assert check_sparsity(0.999) == 0.999


def test_unknown_selection() -> None:
    assert check_selection("topk") == "topk"
    with pytest.raises(UsageError, match="threshold, topk"):
        check_selection("top-k")
