import torch
from hypothesis import given
from hypothesis import strategies as st

from wina.statistics import BINS, bin_of, cumulative, histogram, share_below, value_at

# Strictly inside the histogram's range.
SCORES = st.lists(st.floats(2**-39, 2**23, width=32), min_size=1, max_size=200)
SHARES = st.floats(0.001, 0.999)


def row(scores: list[float]) -> torch.Tensor:
    return cumulative(histogram(torch.tensor(scores)))[None]


@given(SCORES)
def test_every_score_is_counted_once(scores: list[float]) -> None:
    counts = histogram(torch.tensor(scores))
    assert counts.shape == (BINS,)
    assert counts.sum() == len(scores)


@given(SCORES, SCORES)
def test_histograms_of_two_texts_add_up(first: list[float], second: list[float]) -> None:
    together = histogram(torch.tensor(first + second))
    assert torch.equal(histogram(torch.tensor(first)) + histogram(torch.tensor(second)), together)


@given(st.floats(2**-39, 2**23, width=32), st.floats(1.0, 1.5))
def test_bins_are_monotone_and_a_sixteenth_of_an_octave_wide(score: float, factor: float) -> None:
    pair = torch.tensor([score, score * factor])
    low, high = bin_of(pair).tolist()
    assert low <= high
    if factor >= 1 + 1 / 16:  # the widest bin, relative to its lower edge
        assert low < high


def test_what_lies_outside_the_range_is_clamped_not_lost() -> None:
    scores = torch.tensor([0.0, 1e-30, 2.0**30, torch.inf])
    counts = histogram(scores)
    assert counts[0] == 2
    assert counts[-1] == 2


@given(SCORES, SHARES)
def test_share_below_inverts_value_at(scores: list[float], share: float) -> None:
    cumulated = row(scores)
    value = value_at(cumulated, torch.tensor([share]))
    # A float32 value inside a bin is 2^-19 of the bin away from the exact one at worst.
    torch.testing.assert_close(
        share_below(cumulated, value), torch.tensor([share]).double(), rtol=0, atol=1e-4
    )


@given(SCORES, SHARES, SHARES)
def test_value_at_is_monotone(scores: list[float], one: float, other: float) -> None:
    cumulated = row(scores)
    low, high = value_at(cumulated.expand(2, -1), torch.tensor(sorted((one, other))))
    assert low <= high


@given(SCORES, st.floats(2**-38, 2**22), st.floats(1, 2))
def test_share_below_is_monotone_and_a_share(
    scores: list[float], value: float, factor: float
) -> None:
    cumulated = row(scores).expand(2, -1)
    low, high = share_below(cumulated, torch.tensor([value, value * factor]))
    assert 0 <= low <= high <= 1


@given(st.lists(st.floats(2**-7, 2**7, width=32), min_size=1, max_size=200), SHARES)
def test_value_at_is_within_a_bin_of_the_true_quantile(scores: list[float], share: float) -> None:
    value = float(value_at(row(scores), torch.tensor([share])))
    true = sorted(scores)[min(len(scores) - 1, int(share * len(scores)))]
    below = sorted(scores)[max(0, int(share * len(scores)) - 1)]
    assert below / (1 + 1 / 16) <= value <= true * (1 + 1 / 16)


def test_share_zero_is_value_zero_and_nothing_is_below_zero() -> None:
    cumulated = row([0.5, 1.0, 2.0])
    assert value_at(cumulated, torch.zeros(1)) == 0
    assert share_below(cumulated, torch.zeros(1)) == 0


def test_share_one_is_above_every_score() -> None:
    value = value_at(row([0.5, 1.0, 2.0]), torch.ones(1))
    assert value > 2.0
    assert share_below(row([0.5, 1.0, 2.0]), value) == 1


def test_an_empty_histogram_has_no_shares() -> None:
    cumulated = cumulative(torch.zeros(BINS, dtype=torch.int64))[None]
    assert share_below(cumulated, torch.ones(1)) == 0
