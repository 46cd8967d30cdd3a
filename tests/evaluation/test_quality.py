import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

import wina
from tests.helpers import CONTEXT, english, make_plan, make_tokenizer
from tests.layers.test_swap import assert_same, fingerprint
from wina.errors import UsageError
from wina.evaluation import Evaluation, evaluate, text_windows
from wina.plan import Plan

PREFIX = 5


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_text(english(1200))
    return path


def run(
    model: PreTrainedModel, plans: list[Plan], path: Path, bos: bool = False, context: int = 100
) -> Evaluation:
    return evaluate(
        model,
        make_tokenizer(bos),
        plans,
        [path],
        name="tiny",
        tokens=333,
        context=context,
        dense_prefix=PREFIX,
    )


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_is_what_a_direct_computation_gives(
    each_model: PreTrainedModel, short: Path, bos: bool
) -> None:
    found = run(each_model, [], short, bos)
    ids = make_tokenizer()(short.read_text())["input_ids"][:333]
    start = [0] if bos else []
    length = 100 - len(start)
    total, count = 0.0, 0
    for first in range(0, 333, length):
        window = torch.tensor([start + ids[first : first + length]])
        with torch.no_grad():
            log_p = each_model(window).logits[0].log_softmax(-1)
        for position in range(PREFIX + 1, window.shape[1]):
            total -= float(log_p[position - 1, window[0, position]])
            count += 1
    assert found.start == start
    assert found.tokens == 333
    assert found.scored_positions == count
    assert found.dense.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_zero_sparsity_loses_nothing_at_all(each_model: PreTrainedModel, short: Path) -> None:
    plan = make_plan(each_model, 0.0)
    found = run(each_model, [plan], short)
    (result,) = found.results
    assert result.kl == 0
    assert result.top1_agreement == 1
    assert result.sparsity == 0
    assert result.perplexity == found.dense.perplexity


def test_kl_and_agreement_are_what_a_direct_computation_gives(
    model: PreTrainedModel, short: Path
) -> None:
    plan = make_plan(model, 0.4)
    (result,) = run(model, [plan], short).results
    ids = make_tokenizer()(short.read_text())["input_ids"][:333]
    windows = [torch.tensor([ids[first : first + 100]]) for first in range(0, 333, 100)]
    dense = [model(window).logits[0, PREFIX:-1] for window in windows]
    changed = make_plan(model, 0.4, prefill="sparse", dense_prefix=PREFIX)
    wina.sparsify(model, changed, check=False)
    sparse = [model(window).logits[0, PREFIX:-1] for window in windows]
    p, q = torch.cat(dense).softmax(-1), torch.cat(sparse).log_softmax(-1)
    kl = functional.kl_div(q, p, reduction="batchmean")
    assert result.kl == pytest.approx(kl.item(), rel=1e-4)
    assert result.kl > 0
    agreement = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert result.top1_agreement == pytest.approx(agreement.item())


def test_topk_realizes_its_sparsity_exactly(each_model: PreTrainedModel, short: Path) -> None:
    plan = make_plan(each_model, 1.0, keep=0.25)
    (result,) = run(each_model, [plan], short).results
    assert result.sparsity == 0.75
    assert set(result.by_kind.values()) == {0.75}
    assert result.by_block == {0: 0.75, 1: 0.75}


def test_groups_weigh_up_to_the_whole(model: PreTrainedModel, short: Path) -> None:
    plan = make_plan(model, lambda name, width: torch.full((width,), 0.1 + 0.05 * len(name)))
    (result,) = run(model, [plan], short).results
    sizes: dict[str, int] = {}
    for linear in plan.document.linears.values():
        weights = linear.in_features * linear.out_features
        sizes[linear.kind] = sizes.get(linear.kind, 0) + weights
    mean = sum(result.by_kind[kind] * size for kind, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(result.sparsity)
    assert (result.by_block[0] + result.by_block[1]) / 2 == pytest.approx(result.sparsity)


def test_the_head_counts_when_it_is_planned(
    model: PreTrainedModel, short: Path, calibration: tuple[Path, wina.Calibration]
) -> None:
    made = calibration[1]
    with_head = made.plan(0.5, "wina", "uniform", "topk", include_head=True)
    without = made.plan(0.5, "wina", "uniform", "topk")
    one, other = run(model, [with_head, without], short).results
    assert one.by_kind["lm_head"] == 0.5
    assert "lm_head" not in other.by_kind
    assert one.sparsity == other.sparsity == 0.5
    assert one.kl != other.kl


def test_the_model_is_dense_before_between_and_after(model: PreTrainedModel, short: Path) -> None:
    before = fingerprint(model)
    found = run(model, [make_plan(model, 0.4), make_plan(model, 0.0)], short)
    assert found.results[1].kl == 0
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": CONTEXT + 1}, f"context is {CONTEXT} positions, {CONTEXT + 1} were asked"),
        ({"context": 7, "dense_prefix": 6}, "leaves nothing of the context"),
        ({"context": 0}, "leaves nothing of the context"),
        ({"tokens": 6, "dense_prefix": 5}, "the text has 6 tokens"),
        ({"tokens": 0}, "at least 1"),
        ({"tokens": -3}, "at least 1"),
        ({"dense_prefix": -1}, "dense prefix"),
    ],
)
def test_too_little_to_score(
    model: PreTrainedModel, short: Path, options: dict[str, int], message: str
) -> None:
    settings = {"tokens": 100, "context": 50, "dense_prefix": 5, **options}
    with pytest.raises(UsageError, match=message):
        text_windows(model, make_tokenizer(), [short], **settings)


def test_windows_cover_the_text_once_and_a_useless_rest_is_left(
    model: PreTrainedModel, short: Path
) -> None:
    tokenizer = make_tokenizer(bos=True)
    windows, start = text_windows(model, tokenizer, [short], 205, 101, PREFIX)
    assert start == [0]
    assert [window.shape for window in windows] == [(1, 101), (1, 101)]  # five tokens are too few
    joined = torch.cat([window[0, 1:] for window in windows]).tolist()
    assert joined == tokenizer(short.read_text(), add_special_tokens=False)["input_ids"][:200]
