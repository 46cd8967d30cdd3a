import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers import make_plan, prompt
from wina.layers import SparsityCounter, phase_of, scoring, sparsify
from wina.layers.linear import features


def test_topk_drops_exactly_what_it_says(each_model: PreTrainedModel) -> None:
    plan = make_plan(each_model, 1.0, keep=0.25)
    ids = prompt(9, batch=2)
    with scoring(each_model, plan, 0), SparsityCounter(each_model) as counter:
        each_model(ids, use_cache=False)
    for name, share in counter.by_linear().items():
        linear = plan.document.linears[name]
        assert linear.keep is not None
        assert share == 1 - linear.keep / linear.in_features
    assert counter.sparsity == 0.75


def test_counts_agree_with_a_count_by_hand_and_weigh_by_output(model: PreTrainedModel) -> None:
    plan = make_plan(model, lambda name, width: torch.full((width,), 0.9 if "q_" in name else 0.1))
    ids, prefix = prompt(9), 3
    by_hand: dict[str, float] = {}

    def count(name: str) -> object:
        def hook(_module: object, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0][:, prefix:]
            by_hand[name] = float((rows.abs() < plan.vectors[name]).float().mean())

        return hook

    with scoring(model, plan, prefix), SparsityCounter(model) as counter:
        for name in plan.vectors:
            model.get_submodule(name).register_forward_pre_hook(count(name))
        model(ids, use_cache=False)
    assert counter.by_linear() == pytest.approx(by_hand)
    weights = {name: features(model.get_submodule(name)) for name in by_hand}
    total = sum(i * o for i, o in weights.values())
    wanted = sum(share * weights[n][0] * weights[n][1] for n, share in by_hand.items()) / total
    assert counter.sparsity == pytest.approx(wanted)


def test_dense_calls_do_not_count(model: PreTrainedModel) -> None:
    plan = make_plan(model, 0.5)
    with scoring(model, plan, 4) as phase, SparsityCounter(model) as counter:
        with phase.force("dense"):
            model(prompt(9), use_cache=False)
        model(prompt(4), use_cache=False)
        assert counter.by_linear() == {}
        assert counter.sparsity == 0
        model(prompt(5), use_cache=False)
        assert counter.sparsity > 0


def test_scoring_leaves_the_model_dense_even_after_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError), scoring(model, make_plan(model, 0.5), 0):
        raise RuntimeError
    assert phase_of(model) is None


def test_the_counter_removes_its_hooks(model: PreTrainedModel) -> None:
    sparsify(model, make_plan(model, 0.5, prefill="sparse"))
    with SparsityCounter(model) as counter:
        model(prompt(5), use_cache=False)
    seen = counter.sparsity
    model(prompt(50), use_cache=False)
    assert counter.sparsity == seen
    assert not any(module._forward_pre_hooks for n, module in model.named_modules() if "_proj" in n)
