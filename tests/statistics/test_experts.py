import pytest
import torch

from wina.models import Site
from wina.statistics import BINS, cumulative, histogram, value_at
from wina.statistics.experts import PRIOR, by_layer, histograms, mean_squares

INTO = [Site(f"mlp.experts.{i}.gate_up_proj", "gate_up_proj", 0, 6, 8, i) for i in range(3)]
OUT = [Site(f"mlp.experts.{i}.down_proj", "down_proj", 0, 4, 6, i) for i in range(3)]
OTHER = [Site("attention.q_proj", "q_proj", 0, 6, 6)]


def test_only_experts_are_grouped_and_by_projection() -> None:
    assert by_layer([*OTHER, INTO[0], OUT[0], INTO[1], OUT[1]]) == [INTO[:2], OUT[:2]]


def test_mean_squares_lean_on_the_layer_where_few_tokens_came() -> None:
    many, few = 100_000, 8
    means = [torch.arange(1.0, 7.0).double(), torch.full((6,), 50.0, dtype=torch.float64)]
    totals = {INTO[0].name: means[0] * many, INTO[1].name: means[1] * few}
    rows = {INTO[0].name: many, INTO[1].name: few}
    found = mean_squares(INTO, totals, rows)
    torch.testing.assert_close(found[INTO[0].name], means[0], rtol=1e-2, atol=0)
    pooled = (totals[INTO[0].name] + totals[INTO[1].name]) / (many + few)
    torch.testing.assert_close(found[INTO[2].name], pooled)  # saw none
    between = (few * means[1] + PRIOR * pooled) / (few + PRIOR)
    torch.testing.assert_close(found[INTO[1].name], between)


def test_channels_inside_experts_are_not_mixed() -> None:
    totals = {OUT[0].name: torch.tensor([0.0, 0.0, 0.0, 400.0]).double()}
    found = mean_squares(OUT, totals, {OUT[0].name: 100})
    assert found[OUT[1].name].tolist() == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("louder", [1.0, 8.0])
def test_an_unseen_expert_gets_its_layer_s_quantiles_in_its_own_scale(louder: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 6).abs()
    counts = {INTO[0].name: histogram(x), INTO[1].name: histogram(x[:500])}
    scales = {INTO[0].name: torch.ones(6), INTO[1].name: torch.ones(6)}
    scales[INTO[2].name] = torch.full((6,), louder)
    squares = {site.name: torch.ones(6) for site in INTO}
    found = histograms(INTO, counts, scales, squares)
    assert all(x.shape == (BINS,) and x.dtype == torch.int64 for x in found.values())
    median = value_at(cumulative(torch.stack([found[s.name] for s in INTO])), torch.full((3,), 0.5))
    assert median[2] == pytest.approx(louder * float(x.median()), rel=0.1)
    assert median[0] == pytest.approx(float(x.median()), rel=0.02)
    assert found[INTO[0].name].sum() == pytest.approx(4000 * 6 + PRIOR * 6, rel=0.05)
