"""Experts against plain torch: one token, one expert, one matrix product at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests import families
from tests.helpers import make_plan, prompt
from wina.kernels import available_backends
from wina.layers import densify, lay_out_for_decode, phase_of, sparse_layers, sparsify
from wina.layers.experts import OpenExperts, is_experts, open_experts, opened
from wina.measures import score_plan
from wina.models import find_sites
from wina.plan import Plan

NAMES = ("Mixtral", "DeepSeek-V3, Kimi-K2", "gpt-oss")
CASES = [case for case in families.EXPERTS if case.name in NAMES]
PREFIX = 4


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return families.make(request.param)


def a_plan(model: nn.Module, **options: object) -> Plan:
    """A plan in which every linear has thresholds of its own."""
    seeds = {site.name: number for number, site in enumerate(find_sites(model))}

    def thresholds(name: str, width: int) -> Tensor:
        return torch.rand(width, generator=torch.Generator().manual_seed(seeds[name]))

    return make_plan(model, thresholds, **options)  # type: ignore[arg-type]


class Reference:
    """The dense model with every planned input masked by hand, and every dropped weight counted."""

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        self.model, self.plan = copy.deepcopy(model), plan
        self.dropped = self.seen = 0
        modules = dict(self.model.named_modules())
        for name, module in modules.items():
            if is_experts(module):
                module.forward = lambda *args, m=module, n=name: self.experts(m, n, *args)  # type: ignore[method-assign]
            elif name in plan.vectors:
                module.register_forward_pre_hook(lambda _m, a, n=name: (self.mask(n, a[0]),))

    def mask(self, name: str, x: Tensor, first: int = 0) -> Tensor:
        """Mask rows from position PREFIX on; ``first`` is the position of the first row."""
        linear = self.plan.document.linears[name]
        keep = x.abs() >= self.plan.vectors[name]
        skip = max(0, PREFIX - first)
        flat = keep.view(-1, x.shape[-1])
        flat[:skip] = True
        self.dropped += int((~flat).sum()) * linear.out_features
        self.seen += len(flat[skip:]) * linear.in_features * linear.out_features
        return x * keep

    def experts(
        self, module: nn.Module, name: str, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        out = torch.zeros_like(hidden)
        for position, x in enumerate(hidden):
            for expert, weight in zip(index[position].tolist(), weights[position], strict=True):
                y = x[None]
                for projection in ("gate_up_proj", "down_proj"):
                    y = self.mask(f"{name}.{expert}.{projection}", y, position)
                    matrix = getattr(module, projection)[expert]
                    y = y @ (matrix if module.is_transposed else matrix.T)
                    if module.has_bias:
                        y = y + getattr(module, f"{projection}_bias")[expert]
                    if projection == "gate_up_proj":
                        y = module._apply_gate(y)
                out[position] += weight * y[0]
        return out


@torch.no_grad()
def test_perplexity_and_realized_sparsity_are_the_reference_s(model: PreTrainedModel) -> None:
    plan = a_plan(model)
    reference = Reference(model, plan)
    windows = [prompt(24, seed=seed) for seed in range(3)]
    totals, counter = score_plan(model, plan, windows, PREFIX, "score")
    nll = 0.0
    for ids in windows:
        log_p = reference.model(ids, use_cache=False).logits[0, PREFIX:-1].log_softmax(-1)
        nll -= float(log_p.gather(1, ids[0, PREFIX + 1 :, None]).sum())
    assert totals.positions == 3 * (24 - PREFIX - 1)
    assert totals.perplexity == pytest.approx(math.exp(nll / totals.positions), rel=1e-3)
    assert counter.sparsity == pytest.approx(reference.dropped / reference.seen, abs=1e-4)
    assert 0.1 < counter.sparsity < 0.9
    # What no token was routed to is not there, and experts were counted by their tokens.
    assert len(counter.by_linear()) <= len(plan.vectors)


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    calls: list[str] = []
    for name in ("_one_by_one", "_all_at_once"):
        plain = getattr(OpenExperts, name)
        monkeypatch.setattr(
            OpenExperts, name, lambda *a, p=plain, n=name: (calls.append(n), p(*a))[1]
        )
    yield calls


def test_at_zero_and_in_prompts_transformers_computes(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model(prompt()).logits
    with spied(monkeypatch) as calls:
        sparsify(model, make_plan(model, 0.0, prefill="sparse"))
        assert torch.equal(model(prompt()).logits, wanted)
        sparsify(model, a_plan(model))
        assert torch.equal(model(prompt()).logits, wanted)
        assert calls == []
        model.generate(prompt(), max_new_tokens=3, do_sample=False, pad_token_id=1)
        assert set(calls) == {"_one_by_one"}


def test_at_zero_no_projection_is_looked_at(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer may have hundreds of them, and a call must not cost more than it did."""
    sparsify(model, make_plan(model, 0.0, prefill="sparse"))
    wanted = model(prompt()).logits

    def looked(_experts: OpenExperts) -> Iterator[nn.Module]:
        raise AssertionError("looked at")

    plain = OpenExperts.projections
    monkeypatch.setattr(OpenExperts, "projections", looked)
    assert torch.equal(model(prompt()).logits, wanted)
    monkeypatch.setattr(OpenExperts, "projections", plain)
    seen: list[Tensor] = []
    experts = next(module for module in model.modules() if isinstance(module, OpenExperts))
    handles = [
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for layer in experts.projections()
    ]
    model(prompt())
    assert seen
    for handle in handles:
        handle.remove()
    model(prompt())  # looks, and finds that the hooks are gone
    monkeypatch.setattr(OpenExperts, "projections", looked)
    assert torch.equal(model(prompt()).logits, wanted)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_transformers_gives_the_same(implementation: str) -> None:
    model = families.make(CASES[0])
    wanted = model(prompt()).logits
    plan = a_plan(model, prefill="sparse")
    sparsify(model, plan)
    sparse = model(prompt()).logits
    densify(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(prompt()).logits, wanted)
    sparsify(model, plan)
    assert torch.equal(model(prompt()).logits, sparse)
    assert not torch.allclose(sparse, wanted, rtol=0.1, atol=0.1)


def test_all_at_once_is_one_by_one(model: PreTrainedModel) -> None:
    plan = a_plan(model, prefill="sparse")
    sparsify(model, plan)
    experts = next(module for module in model.modules() if isinstance(module, OpenExperts))
    x = torch.randn(5, 32)
    index = torch.stack([torch.randperm(len(experts.down_proj))[:2] for _ in x])
    weights = torch.rand(5, 2)
    wanted = experts(x, index, weights)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, index, weights), wanted, rtol=1e-4, atol=1e-5)
    # One token goes another way.
    for row in range(5):
        part = slice(row, row + 1)
        one = experts(x[part], index[part], weights[part])
        torch.testing.assert_close(one, wanted[part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"bias": True}])
def test_top_k_and_biases_reach_experts(options: dict[str, object]) -> None:
    model = families.make(CASES[0])
    plan = a_plan(model, prefill="sparse", **options)
    names = [name for name in plan.vectors if ".experts." in name]
    sparsify(model, plan)
    found = model(prompt()).logits
    vectors = {name: plan.vectors[name].flip(0) for name in names}
    changed = replace(plan, vectors={**plan.vectors, **vectors})
    sparsify(model, changed)
    assert not torch.allclose(model(prompt()).logits, found, rtol=1e-2, atol=1e-2)
    if plan.biases:
        other = {**plan.biases, names[0]: plan.biases[names[0]] + 5}
        sparsify(model, replace(plan, biases=other))
        assert not torch.allclose(model(prompt()).logits, found, rtol=1e-2, atol=1e-2)


def test_a_plan_may_leave_experts_out(model: PreTrainedModel) -> None:
    plan = a_plan(model, prefill="sparse")
    kept = [name for name in plan.vectors if not name.endswith(".1.down_proj")]
    linears = {name: plan.document.linears[name] for name in kept}
    document = plan.document.model_copy(update={"linears": linears})
    part = Plan(document, {name: plan.vectors[name] for name in kept})
    vectors = {n: v if n in part.vectors else torch.zeros_like(v) for n, v in plan.vectors.items()}
    sparsify(model, replace(plan, vectors=vectors))
    wanted = model(prompt()).logits
    sparsify(model, part)
    torch.testing.assert_close(model(prompt()).logits, wanted)
    bare = [name for name in plan.vectors if ".experts." not in name]
    linears = {name: plan.document.linears[name] for name in bare}
    document = plan.document.model_copy(update={"linears": linears})
    sparsify(model, Plan(document, {name: plan.vectors[name] for name in bare}))
    assert not any(isinstance(module, OpenExperts) for module in model.modules())


def test_moving_and_copying_keep_float32_thresholds(model: PreTrainedModel) -> None:
    sparsify(model, a_plan(model, prefill="sparse"))
    wanted = model(prompt()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(prompt()).logits, wanted)
    owners = {id(module) for module in twin.modules()}
    for _, layer in sparse_layers(twin):
        assert id(getattr(layer, "owner", twin)) in owners
    twin.to(torch.bfloat16)
    assert all(layer.vector.dtype == torch.float32 for _, layer in sparse_layers(twin))
    assert twin(prompt()).logits.dtype == torch.bfloat16
    torch.testing.assert_close(model(prompt()).logits, wanted)


def test_weights_stored_for_decoding_give_the_same(model: PreTrainedModel) -> None:
    dense = model(prompt()).logits
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    sparsify(model, a_plan(model, prefill="sparse"))
    wanted = model(prompt()).logits
    lay_out_for_decode(model)
    torch.testing.assert_close(model(prompt()).logits, wanted)
    experts = next(module for module in model.modules() if isinstance(module, OpenExperts))
    if "cpu" in available_backends():
        assert all(x.weight.stride(0) == 1 for x in experts.projections())
    densify(model)
    assert {name: parameter.stride() for name, parameter in model.named_parameters()} == strides
    assert torch.equal(model(prompt()).logits, dense)


def test_opening_is_undone_and_repeats(model: PreTrainedModel) -> None:
    classes = [*map(type, model.modules())]
    keys = model.state_dict().keys()
    with opened(model):
        assert open_experts(model) == []
        assert model.state_dict().keys() == keys
        with opened(model):
            pass
        assert any(isinstance(module, OpenExperts) for module in model.modules())
        wanted = model(prompt()).logits
    assert [*map(type, model.modules())] == classes
    assert torch.equal(model(prompt()).logits, wanted)


def test_routers_are_not_sites() -> None:
    names = [site.name for site in find_sites(families.make(families.EXPERTS[2]))]
    assert any("shared_expert.down_proj" in name for name in names)
    assert not [name for name in names if "shared_expert_gate" in name]


def test_experts_split_over_processes_stay_dense(model: PreTrainedModel) -> None:
    for module in model.modules():
        if is_experts(module):
            module._is_expert_parallel = True
    assert all(site.expert is None for site in find_sites(model))
    assert phase_of(model) is None
