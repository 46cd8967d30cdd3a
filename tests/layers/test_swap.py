from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tests.helpers import make_model, make_plan, prompt
from wina import layers
from wina.errors import WinaError
from wina.layers import change_vectors, densify, phase_of, sparse_layers, sparsify


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Return everything that a restored model must share with the original."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: (
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
                list(module._forward_pre_hooks_with_kwargs),
            )
            for name, module in model.named_modules()
        },
        "buffers": [name for name, _ in model.named_buffers()],
        "config": model.config.to_dict() if isinstance(model, PreTrainedModel) else None,
    }


def assert_same(found: dict[str, object], wanted: dict[str, object]) -> None:
    one, other = found.pop("state"), wanted.pop("state")
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert found == wanted


@pytest.mark.parametrize("keep", [None, 0.5])
def test_densify_restores_exactly(each_model: PreTrainedModel, keep: float | None) -> None:
    ids = prompt()
    before, logits = fingerprint(each_model), each_model(ids).logits
    sparsify(each_model, make_plan(each_model, 0.5, keep=keep, prefill="sparse"))
    assert not torch.allclose(each_model(ids).logits, logits)
    layers.densify(each_model)
    assert_same(fingerprint(each_model), before)
    assert torch.equal(each_model(ids).logits, logits)


@pytest.mark.parametrize("keep", [None, 1.0])
def test_zero_sparsity_is_bit_equal(each_model: PreTrainedModel, keep: float | None) -> None:
    ids = prompt(20)
    wanted = each_model(ids).logits
    sparsify(
        each_model, make_plan(each_model, 0.0 if keep is None else 1.0, keep=keep, prefill="sparse")
    )
    assert torch.equal(each_model(ids).logits, wanted)


def decode(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the last position's logits, prefilled up to it and decoded with a cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        return model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]


def masked_reference(model: PreTrainedModel, threshold: float) -> PreTrainedModel:
    """Return a copy whose linears get hooks that mask the input of single positions."""
    copy = deepcopy(model)

    def mask(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        return (torch.where(x.abs() >= threshold, x, 0),) if x.shape[-2] == 1 else args

    for name in make_plan(model, 0.0).document.linears:
        copy.get_submodule(name).register_forward_pre_hook(mask)
    return copy


def test_prefill_is_dense_and_a_decode_step_is_the_masked_computation(
    each_model: PreTrainedModel,
) -> None:
    ids = prompt(10)
    dense_logits, dense_step = each_model(ids).logits, decode(each_model, ids)
    wanted = decode(masked_reference(each_model, 0.4), ids)
    sparsify(each_model, make_plan(each_model, 0.4))
    assert torch.equal(each_model(ids).logits, dense_logits)
    found = decode(each_model, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, dense_step, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_token_does_not_depend_on_its_batch(
    each_model: PreTrainedModel, keep: float | None
) -> None:
    plan = make_plan(each_model, 0.4 if keep is None else 1.0, keep=keep)
    sparsify(each_model, plan)
    ids = prompt(10, batch=3)
    together = decode(each_model, ids)
    alone = torch.cat([decode(each_model, row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_sparse_prefill_equals_sparse_decode(each_model: PreTrainedModel) -> None:
    ids = prompt(8)
    sparsify(each_model, make_plan(each_model, 0.4, prefill="sparse"))
    whole = each_model(ids).logits
    cache = DynamicCache(config=each_model.config)
    steps = [
        each_model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        for i in range(ids.shape[1])
    ]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-3, atol=1e-3)


def test_the_dense_prefix_stays_dense(model: PreTrainedModel) -> None:
    ids = prompt(10)
    wanted = model(ids).logits
    sparsify(model, make_plan(model, 0.4, prefill="sparse", dense_prefix=4))
    found = model(ids).logits
    torch.testing.assert_close(found[:, :4], wanted[:, :4])
    assert not torch.allclose(found[:, 4:], wanted[:, 4:], rtol=1e-2, atol=1e-2)


def test_a_new_plan_replaces_the_old_one(model: PreTrainedModel) -> None:
    before = fingerprint(model)
    first = sparsify(model, make_plan(model, 0.2))
    second = sparsify(model, make_plan(model, 1.0, keep=0.5))
    assert phase_of(model) is second is not first
    assert {layer.vector_name for _, layer in sparse_layers(model)} == {"scales"}
    layers.densify(model)
    assert phase_of(model) is None
    assert_same(fingerprint(model), before)


def test_densifying_a_dense_model_changes_nothing(model: PreTrainedModel) -> None:
    before = fingerprint(model)
    layers.densify(model)
    assert_same(fingerprint(model), before)


def test_a_plan_does_not_share_memory_with_the_model(model: PreTrainedModel) -> None:
    plan = make_plan(model, 0.4)
    sparsify(model, plan)
    for _, layer in sparse_layers(model):
        layer.vector.fill_(9.0)
    assert all((vector == 0.4).all() for vector in plan.vectors.values())


def test_a_plan_of_another_model_changes_nothing(model: PreTrainedModel) -> None:
    before = fingerprint(model)
    with pytest.raises(WinaError, match="no such layer"):
        sparsify(model, make_plan(make_model("gpt2"), 0.5))
    plan = make_plan(model, 0.5)
    linears = dict(plan.document.linears)
    name = list(linears)[-1]
    linears[name] = linears[name].model_copy(update={"out_features": 7})
    object.__setattr__(plan, "document", plan.document.model_copy(update={"linears": linears}))
    with pytest.raises(WinaError, match=r"maps 48 to 7 features, the model's 48 to 32"):
        sparsify(model, plan)
    model.model.layers[0].mlp.down_proj = nn.Identity()
    before["types"]["model.layers.0.mlp.down_proj"] = nn.Identity  # type: ignore[index]
    with pytest.raises(WinaError, match="a Identity there"):
        sparsify(model, make_plan(make_model("qwen3"), 0.5))
    assert phase_of(model) is None
    assert fingerprint(model)["types"] == before["types"]


@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_decode_step_compiles_as_one_graph(model: PreTrainedModel, keep: float | None) -> None:
    sparsify(model, make_plan(model, 0.4 if keep is None else 1.0, keep=keep))
    ids = prompt(10)
    wanted = decode(model, ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        found = compiled(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_vectors_and_biases_change_in_place(model: PreTrainedModel) -> None:
    """As when the model were made sparse anew; what held the old tensors keeps them."""
    ids = prompt()
    plans = [make_plan(model, 0.2), make_plan(model, 0.4, bias=True), make_plan(model, 0.0)]
    wanted = []
    for plan in plans:
        sparsify(model, plan).prefill = "sparse"
        wanted.append(model(ids).logits)
        densify(model)
    sparsify(model, plans[0]).prefill = "sparse"
    name, layer = next(iter(sparse_layers(model)))
    old = layer.vector
    for plan, logits in zip(plans, wanted, strict=True):
        change_vectors(model, plan)
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(old, plans[0].vectors[name])
    with pytest.raises(WinaError, match="same linears"):
        change_vectors(model, make_plan(model, 1.0, keep=0.5))
    densify(model)
    assert not list(sparse_layers(model))
