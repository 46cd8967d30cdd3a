"""Bases: orthogonal as promised, exact on the dense model, and undone exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import wina
from tests.helpers import KINDS, english, make_config, make_plan, make_tokenizer, prompt
from wina.bases import Basis, GroupFacts, bases
from wina.calibration.rotated import ModelBases, find_bases, in_bases, recollect, with_bases
from wina.errors import UsageError, WinaError
from wina.layers import phase_of, scoring
from wina.layers.linear import matrix
from wina.models import LoadedModel, input_groups, norm_scale
from wina.plan import Plan

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}


def config_of(family: str) -> PreTrainedConfig:
    if family in KINDS:
        return make_config(family)
    classes = {
        "qwen2": Qwen2Config,
        "phi3": Phi3Config,
        "gemma": GemmaConfig,
        "gemma2": Gemma2Config,
        "gemma3": Gemma3TextConfig,
    }
    return classes[family](**SHAPE)


def model_of(family: str) -> PreTrainedModel:
    """A tiny random model whose norms' weights are not what they start as."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def calibrated(model: PreTrainedModel, tmp_path: Path) -> wina.Calibration:
    text = tmp_path / "text.txt"
    text.write_text(english(6_000))
    return wina.calibrate(
        model,
        make_tokenizer(),
        text,
        tokens=512,
        context=64,
        dense_prefix=4,
        gradient=False,
        verdict=False,
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(prompt(24, batch=2), use_cache=False).logits
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("maker", ["svd", "pca"])
def test_exact_on_the_dense_model(family: str, maker: str, tmp_path: Path) -> None:
    model = model_of(family)
    wanted = logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = find_bases(model, maker, calibrated(model, tmp_path))
    assert len(found.groups) == (2 if family == "gpt2" else 4)  # GPT-2's MLP has no gate
    with in_bases(model, found):
        changed = [n for n, tensor in model.state_dict().items() if not tensor.equal(weights[n])]
        assert sorted(changed) == sorted(
            f"{name}.weight" for group in found.groups for name in group.linears
        )
        assert error(logits(model), wanted) <= 1e-5
    assert logits(model).equal(wanted)
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.demo
def test_exact_on_a_real_model(demo: LoadedModel) -> None:
    model = demo.model
    wanted = logits(model)
    with pytest.raises(UsageError, match="needs a calibration"):
        find_bases(model, "pca")
    found = find_bases(model, "svd")
    assert len(found.groups) == 60
    with in_bases(model, found):
        assert error(logits(model), wanted) <= 1e-5
        for group in found.groups[:4]:
            weight = matrix(model.get_submodule(group.leader)).double()
            products = weight.T @ weight
            off = products - products.diag().diag()
            assert off.abs().max() < 1e-5 * products.max()
            # k_proj has 192 outputs: the other columns are exactly zero.
            rank = min(weight.shape)
            assert int((weight != 0).any(dim=0).sum()) == rank
    assert logits(model).equal(wanted)


def test_groups_leaders_and_norms(each_model: PreTrainedModel) -> None:
    groups = input_groups(each_model)
    kinds = [tuple(name.rpartition(".")[2] for name in group.linears) for group in groups]
    if each_model.config.model_type == "gpt2":
        assert kinds == [("c_attn",)] * 2
    else:
        assert kinds == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2
        assert [group.leader.rpartition(".")[2] for group in groups] == ["k_proj", "gate_proj"] * 2
    assert all(group.norm is not None for group in groups)


def test_the_norms_scale_is_measured_whatever_it_is_stored_as() -> None:
    for family, stored in [("llama", 0.0), ("gemma", 1.0), ("gemma3", 1.0)]:
        model = model_of(family)
        for group in input_groups(model):
            assert group.norm is not None
            weight = model.get_submodule(group.norm).weight.detach()
            assert torch.allclose(norm_scale(model, group), weight + stored, rtol=1e-4, atol=1e-5)


def test_a_channel_that_its_norm_switches_off() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    group = input_groups(model)[0]
    scale = norm_scale(model, group)
    assert scale[3] == 1
    wanted = logits(model)
    weight = matrix(model.get_submodule(group.leader)).detach().double() * scale.double()
    basis = Basis(bases.get("svd").matrix(GroupFacts(weight)).float(), scale)
    with in_bases(model, ModelBases("svd", [group], [basis])):
        assert error(logits(model), wanted) <= 1e-5


def test_makers_by_their_formulas() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 10, dtype=torch.float64)
    q = bases.get("svd").matrix(GroupFacts(weight))
    assert torch.allclose(q.T @ q, torch.eye(10, dtype=torch.float64))
    products = (weight @ q).T @ (weight @ q)
    assert torch.allclose(products, products.diag().diag(), atol=1e-10)
    assert (products.diag()[6:] < 1e-20).all()
    z = torch.randn(500, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    q = bases.get("pca").matrix(GroupFacts(weight, z.T @ z))
    assert torch.allclose(q.T @ q, torch.eye(10, dtype=torch.float64))
    rotated = (z @ q).T @ (z @ q)
    assert torch.allclose(rotated, rotated.diag().diag(), atol=1e-7)
    assert (rotated.diag().diff() <= 0).all()
    with pytest.raises(UsageError, match="covariance"):
        bases.get("pca").matrix(GroupFacts(weight))


def test_x_is_rotated_once_for_a_group() -> None:
    model = model_of("llama")
    found = find_bases(model, "svd")
    seen: dict[str, Tensor] = {}
    with in_bases(model, found):
        for name in found.groups[0].linears:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, name=name: seen.setdefault(name, args[0]) is None or None
            )
        logits(model)
    assert len({id(x) for x in seen.values()}) == 1


def planned(model: PreTrainedModel, tmp_path: Path, threshold: float = 0.4) -> Plan:
    calibration = calibrated(model, tmp_path)
    found = find_bases(model, "svd", calibration)
    return with_bases(make_plan(model, threshold), found)


def test_a_plan_in_a_basis_by_hand(tmp_path: Path) -> None:
    """One linear: y = (W d Q) mask(Q^T (x / d)), and dense calls as ever."""
    model = model_of("llama")
    plan = planned(model, tmp_path)
    wanted = logits(model)
    name = "model.layers.0.mlp.gate_proj"
    layer = model.get_submodule(name)
    weight = matrix(layer).detach().clone()
    q, d = plan.parts[f"{name}.basis"], plan.parts[f"{name}.basis_scale"]
    x = torch.randn(3, 5, 32)
    z = (x / d) @ q
    by_hand = torch.where(z.abs() < 0.4, 0, z) @ ((weight * d) @ q).T
    with scoring(model, plan, 0) as phase:
        assert torch.allclose(layer(x), by_hand, atol=1e-5)
        with phase.force("dense"):
            assert error(logits(model), wanted) <= 1e-5
    assert layer.weight.equal(weight)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert logits(model).equal(wanted)


def test_a_plan_in_a_basis_on_disk(tmp_path: Path) -> None:
    model = model_of("qwen2")
    plan = planned(model, tmp_path)
    again = Plan.load(plan.save(tmp_path / "plan"))
    assert again.document == plan.document
    assert again.document.schema_version == 2
    assert all(tensor.equal(again.parts[name]) for name, tensor in plan.parts.items())
    with scoring(model, plan, 0):
        wanted = logits(model)
    with scoring(model, again, 0):
        assert logits(model).equal(wanted)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan = planned(model_of("llama"), tmp_path)
    name = next(name for name in plan.parts if name.endswith(".basis"))
    document = plan.document
    with pytest.raises(WinaError, match="disagree on"):
        Plan(document, plan.vectors, {}, {**plan.parts, "surprise": torch.zeros(1)})
    with pytest.raises(WinaError, match="is not"):
        Plan(document, plan.vectors, {}, {**plan.parts, name: torch.zeros(2, 2)})
    with pytest.raises(WinaError, match="schema version 2"):
        Plan(document.model_copy(update={"schema_version": 1}), plan.vectors, {}, plan.parts)


def test_a_sparse_model_in_a_basis_is_not_saved_without_it(tmp_path: Path) -> None:
    model = model_of("llama")
    wina.sparsify(model, planned(model, tmp_path), check=False)
    with pytest.raises(UsageError, match="plan's own folder"):
        model.save_pretrained(tmp_path / "model")
    wina.densify(model)
    model.save_pretrained(tmp_path / "model")


def test_decoding_in_a_basis(tmp_path: Path) -> None:
    """A cached decode step gives what the whole text gives, sparse from some position on."""
    model = model_of("llama")
    plan = planned(model, tmp_path)
    ids = prompt(12)
    with scoring(model, plan, 11), torch.no_grad():
        wanted = model(ids, use_cache=False).logits[:, -1]
    wina.sparsify(model, plan, check=False)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        found = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    assert torch.allclose(found, wanted, atol=1e-4)
    assert phase_of(model) is not None


def test_statistics_in_a_basis_by_hand(tmp_path: Path) -> None:
    model = model_of("llama")
    calibration = calibrated(model, tmp_path)
    found = find_bases(model, "pca", calibration)
    name = "model.layers.1.mlp.up_proj"
    index = next(i for i, group in enumerate(found.groups) if name in group.linears)
    basis = found.found[index]
    squares = torch.zeros(32, dtype=torch.float64)
    count = 0

    def see(_module: object, args: tuple[Tensor, ...]) -> None:
        nonlocal count
        z = (args[0][0, 4:] / basis.scale) @ basis.matrix
        squares.add_(z.double().square().sum(0))
        count += len(z)

    handle = model.get_submodule(name).register_forward_pre_hook(see)
    with torch.no_grad():
        for ids in calibration.windows():
            model(ids, use_cache=False)
    handle.remove()
    with in_bases(model, found):
        again = recollect(model, calibration, gradient=True)
    linear = next(x for x in again.statistics if x.site.name == name)
    weight = (matrix(model.get_submodule(name)).detach() * basis.scale) @ basis.matrix
    assert torch.allclose(linear.mean_square, (squares / count).float(), rtol=1e-4)
    assert torch.allclose(linear.column_norm, weight.norm(dim=0), rtol=1e-4)
    assert linear.gradient_rms is not None
    assert (linear.gradient_rms > 0).all()
    # PCA sorts the power of what the group's linears see.
    assert (linear.mean_square.diff() <= 1e-4 * linear.mean_square[0]).all()
