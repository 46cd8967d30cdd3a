from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wina.allocation import allocate_globally, allocate_uniformly, build_plan, loss_scale
from wina.criteria import LinearFacts, criteria
from wina.errors import UsageError
from wina.models import Site
from wina.plan import ModelIdentity
from wina.selection import threshold_mask
from wina.statistics import LinearStatistics, histogram

SEEDS = st.integers(0, 2**31)
TARGETS = st.floats(0.01, 0.95)
ME = ModelIdentity(name="tiny", config_hash="a", weights_hash="b", dtype="float32")


def linear(index: int, seed: int, tokens: int = 64, gradient: bool = True) -> LinearStatistics:
    """Return the statistics of random inputs of a random linear; no two are alike."""
    generator = torch.Generator().manual_seed(seed + index)
    width, height = 6 + 2 * index, 24 - 5 * index
    site = Site(f"layers.{index}.q_proj", "q_proj", index, width, height)
    x = torch.randn(tokens, width, generator=generator) * (index + 1)
    norm = torch.rand(width, generator=generator) + 0.2
    rms = torch.rand(width, generator=generator) * 0.1 + 0.01 if gradient else None
    facts = LinearFacts(site.kind, norm, rms)
    names = [n for n in ("wina", "teal", "loss") if gradient or n != "loss"]
    counts = {n: histogram(x.abs() * criteria.get(n).scale(facts)) for n in names}
    return LinearStatistics(site, norm, x.square().mean(0), rms, counts)


def linears(seed: int, gradient: bool = True) -> list[LinearStatistics]:
    return [linear(index, seed, gradient=gradient) for index in range(3)]


def met(statistics: list[LinearStatistics], sparsities: torch.Tensor) -> float:
    weights = torch.tensor([float(x.site.weights) for x in statistics]).double()
    return float((sparsities * weights).sum() / weights.sum())


@given(SEEDS, TARGETS, st.sampled_from(["wina", "teal", "loss"]))
def test_uniform_and_global_meet_the_target(seed: int, target: float, method: str) -> None:
    statistics, criterion = linears(seed), criteria.get(method)
    for allocate in (allocate_uniformly, allocate_globally):
        found = allocate(statistics, criterion, target)
        assert met(statistics, found) == pytest.approx(target, abs=1e-6)
        assert ((found >= 0) & (found <= 1)).all()
    assert (allocate_uniformly(statistics, criterion, target) == target).all()


@given(SEEDS, TARGETS, TARGETS)
def test_a_higher_target_drops_no_less_anywhere(seed: int, one: float, other: float) -> None:
    statistics, criterion = linears(seed), criteria.get("wina")
    low, high = (allocate_globally(statistics, criterion, x) for x in sorted((one, other)))
    assert (low <= high + 1e-9).all()


def test_target_zero_drops_nothing() -> None:
    for allocate in (allocate_uniformly, allocate_globally):
        assert (allocate(linears(0), criteria.get("wina"), 0.0) == 0).all()


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("method", ["wina", "teal", "loss"])
def test_global_costs_least_over_all_shares(target: float, method: str) -> None:
    """Brute force: the cost is a sum over linears of the squares of the lowest scores."""
    criterion, statistics, scores = criteria.get(method), [], []
    for index, known in enumerate(linears(7)):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(100, known.site.in_features, generator=generator) * (index + 1)
        score = x.abs() * criterion.scale(known.facts)
        scores.append(score.flatten().sort().values.double())
        square = x.square().mean(0)
        counts = {method: histogram(score)}
        statistics.append(
            LinearStatistics(known.site, known.column_norm, square, known.gradient_rms, counts)
        )

    def cost(index: int, share: float) -> float:
        """Return nats a token of dropping this share of a linear's scores."""
        known = statistics[index]
        kept = torch.cat([torch.zeros(1).double(), scores[index].square().cumsum(0)])
        place = share * len(scores[index])
        low = int(place)
        value = float(kept[low])
        if low < len(scores[index]):
            value += (place - low) * float(scores[index][low].square())
        return value / 100 * loss_scale(known, criterion) ** 2

    weights = [known.site.weights for known in statistics]
    grid = [i / 40 for i in range(41)]
    table = [[cost(index, share) for share in grid] for index in range(3)]
    best = min(
        sum(table[i][s] for i, s in enumerate(steps))
        for steps in product(range(41), repeat=3)
        if sum(grid[s] * w for s, w in zip(steps, weights, strict=True)) >= target * sum(weights)
    )
    found = allocate_globally(statistics, criterion, target).tolist()
    # A histogram's bin is up to 1/16 wide, so shares are near, not at, the continuous optimum.
    assert sum(cost(i, share) for i, share in enumerate(found)) <= best * 1.01
    uniform = sum(cost(i, target) for i in range(3))
    assert sum(cost(i, share) for i, share in enumerate(found)) < uniform


def test_loss_scale_gives_a_linear_its_gradients_total() -> None:
    known = linear(1, 3)
    for method in ("wina", "teal"):
        criterion = criteria.get(method)
        scale = loss_scale(known, criterion) * criterion.scale(known.facts)
        assert known.gradient_rms is not None
        wanted = (known.mean_square * known.gradient_rms.square()).sum()
        torch.testing.assert_close((known.mean_square * scale.square()).sum(), wanted)
    assert loss_scale(known, criteria.get("loss")) == 1.0


def test_global_without_gradients_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="--no-gradient"):
        allocate_globally(linears(0, gradient=False), criteria.get("wina"), 0.5)


def test_a_method_that_was_not_collected_is_named() -> None:
    with pytest.raises(UsageError, match="no scores of method 'wina-kgate'"):
        allocate_globally(linears(0), criteria.get("wina-kgate"), 0.5)


def plan(statistics: list[LinearStatistics], shares: list[float], selection: str = "threshold"):  # type: ignore[no-untyped-def]
    return build_plan(
        statistics,
        criteria.get("wina"),
        torch.tensor(shares, dtype=torch.float64),
        selection,  # type: ignore[arg-type]
        model=ME,
        allocation="uniform",
        target=0.5,
    )


@given(SEEDS, st.floats(0.05, 0.95))
def test_thresholds_drop_the_share_they_were_made_for(seed: int, share: float) -> None:
    known = linear(0, seed, tokens=500)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, known.site.in_features, generator=generator)
    made = plan([known], [share])
    dropped = 1 - threshold_mask(x, made.vectors[known.site.name]).float().mean()
    # 3,000 scores; a bin is a sixteenth of an octave and holds at most about four per cent.
    assert float(dropped) == pytest.approx(share, abs=0.03)
    assert made.sparsity == pytest.approx(share)


def test_thresholds_are_the_cutoff_over_the_scale() -> None:
    known = linear(0, 0)
    vector = plan([known], [0.5]).vectors[known.site.name]
    products = vector * known.column_norm
    torch.testing.assert_close(products, products[:1].expand_as(products))


def test_share_zero_makes_zero_thresholds_and_a_zero_column_is_always_dropped() -> None:
    known = linear(0, 0)
    known.column_norm[2] = 0
    assert (plan([known], [0.0]).vectors[known.site.name] == 0).all()
    vector = plan([known], [0.5]).vectors[known.site.name]
    assert vector[2] == torch.inf
    assert vector.isfinite().sum() == len(vector) - 1


def test_topk_rounds_to_whole_channels_and_says_so() -> None:
    known = linear(0, 0)  # six channels
    made = plan([known], [0.4], "topk")
    planned = made.document.linears[known.site.name]
    assert planned.keep == 4
    assert planned.sparsity == pytest.approx(1 / 3)
    assert torch.equal(made.vectors[known.site.name], known.column_norm)
