"""What WINA's score promises for one linear y = W x, by brute force in small dimensions.

Dropping the channels S costs ||W_S x_S||^2. With orthogonal columns this is the sum over S of
(|x_j| ||W_:j||)^2, so for every single x, hence also in expectation over any distribution of x:
the WINA mask has the least error of all masks of its size, and in particular no more than TEAL's
of the same size (the bound of arXiv 2505.19427 against TEAL); with equal norms both are the same.
"""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wina.criteria import LinearFacts, criteria
from wina.selection import topk_mask

SEEDS = st.integers(0, 2**31)


def orthogonal(width: int, seed: int, equal_norms: bool) -> tuple[Tensor, Tensor]:
    """Return W (width + 2, width) with orthogonal columns and inputs x (16, width), float64."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(width + 2, width, generator=generator, dtype=torch.float64)
    weight = torch.linalg.qr(square).Q
    if not equal_norms:
        weight = weight * (torch.rand(width, generator=generator, dtype=torch.float64) * 3 + 0.1)
    return weight, torch.randn(16, width, generator=generator, dtype=torch.float64)


def mask_of(method: str, weight: Tensor, x: Tensor, keep: int) -> Tensor:
    facts = LinearFacts("q_proj", torch.linalg.vector_norm(weight, dim=0))
    return topk_mask(x, criteria.get(method).scale(facts), keep)


def errors(weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return ||W (x - mask o x)||^2 of each token."""
    return ((x * ~mask) @ weight.T).square().sum(-1)


def least_errors(weight: Tensor, x: Tensor, keep: int) -> Tensor:
    """Return the least error of each token over all masks that keep ``keep`` channels."""
    width = weight.shape[1]
    every = []
    for kept in combinations(range(width), keep):
        mask = torch.zeros(width, dtype=torch.bool)
        mask[list(kept)] = True
        every.append(errors(weight, x, mask))
    return torch.stack(every).amin(0)


@given(st.integers(1, 7), st.data(), SEEDS, st.booleans())
def test_wina_is_optimal_over_all_masks_with_orthogonal_columns(
    width: int, data: st.DataObject, seed: int, equal_norms: bool
) -> None:
    keep = data.draw(st.integers(0, width))
    weight, x = orthogonal(width, seed, equal_norms)
    found = errors(weight, x, mask_of("wina", weight, x, keep))
    # Scores are compared in float32, so all but tied ones may be swapped.
    torch.testing.assert_close(found, least_errors(weight, x, keep), rtol=1e-5, atol=1e-9)


@given(st.integers(1, 12), st.data(), SEEDS)
def test_wina_loses_no_more_than_teal_with_orthogonal_columns(
    width: int, data: st.DataObject, seed: int
) -> None:
    keep = data.draw(st.integers(0, width))
    weight, x = orthogonal(width, seed, equal_norms=False)
    wina = errors(weight, x, mask_of("wina", weight, x, keep))
    teal = errors(weight, x, mask_of("teal", weight, x, keep))
    assert (wina <= teal * (1 + 1e-5) + 1e-9).all()
    assert wina.mean() <= teal.mean() * (1 + 1e-5) + 1e-9


@given(st.integers(1, 12), st.data(), SEEDS)
def test_wina_and_teal_are_the_same_with_equal_norms(
    width: int, data: st.DataObject, seed: int
) -> None:
    keep = data.draw(st.integers(0, width))
    weight, x = orthogonal(width, seed, equal_norms=True)
    wina = errors(weight, x, mask_of("wina", weight, x, keep))
    teal = errors(weight, x, mask_of("teal", weight, x, keep))
    torch.testing.assert_close(wina, teal, rtol=1e-5, atol=1e-9)


def test_wina_beats_teal_strictly_where_norms_differ() -> None:
    weight = torch.diag(torch.tensor([10.0, 1.0], dtype=torch.float64))
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    wina = errors(weight, x, mask_of("wina", weight, x, 1))
    teal = errors(weight, x, mask_of("teal", weight, x, 1))
    assert wina.item() == pytest.approx(4)
    assert teal.item() == pytest.approx(100)


def test_without_orthogonality_wina_need_not_be_optimal() -> None:
    # Two columns that cancel: keeping both or dropping both is best, and WINA keeps one.
    weight = torch.tensor([[1.0, -1.0, 0.9], [0.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[2.0, 1.9, 1.0]], dtype=torch.float64)
    found = errors(weight, x, mask_of("wina", weight, x, 1))
    assert found > least_errors(weight, x, 1) * 2
