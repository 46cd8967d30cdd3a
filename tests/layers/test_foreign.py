"""Linears that only another library can compute, without any such library: a gate in front."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import wina
from tests.conformance import continue_text, decode, masked
from tests.helpers import make_model, make_plan, prompt
from wina.bench import BenchSettings, bench
from wina.evaluation import evaluate
from wina.generation import generate
from wina.layers import MaskedLayer, SparseLinear, phase_of, sparse_layers
from wina.layers.experts import is_experts
from wina.layers.foreign import dequantized, is_foreign, probed
from wina.layers.linear import matrix
from wina.methods import Setting, methods
from wina.models import find_sites, identify
from wina.plan import Plan

SETTINGS = {"tokens": 768, "context": 128, "dense_prefix": 4, "verdict": False}


class Packed(nn.Module):
    """W x + b with W in bytes, as quantized linears have it; no gradient, no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / self.scales).round().to(torch.int8))
        self.register_parameter("bias", linear.bias)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.float() * self.scales, self.bias)


class Squared(Packed):
    """Not linear at all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.square())


def replaced(form: type[Packed] = Packed) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model whose MLPs are packed, and one with the same weights unpacked."""
    packed = make_model("qwen3")
    for name, module in list(packed.named_modules()):
        if ".mlp." in name and isinstance(module, nn.Linear):
            packed.set_submodule(name, form(module))
    plain = make_model("qwen3")
    for name, module in packed.named_modules():
        if isinstance(module, Packed):
            plain.get_submodule(name).weight.data = module.codes * module.scales
    return packed, plain


@pytest.fixture
def model() -> PreTrainedModel:
    return replaced()[0]


def test_the_whole_way(text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    packed, plain = replaced()
    untouched, ids = copy.deepcopy(packed), prompt(10)
    dense = packed(ids).logits
    calibration = wina.calibrate(packed, tokenizer, text, **SETTINGS)
    wanted = wina.calibrate(plain, tokenizer, text, **SETTINGS)
    for found, of_plain in zip(calibration.statistics, wanted.statistics, strict=True):
        assert found.site == of_plain.site
        for name in ("column_norm", "mean_square", "gradient_rms"):
            one, other = getattr(found, name), getattr(of_plain, name)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.max()))
    plan = calibration.plan(0.5, "loss", "global", model=packed, refine=True)
    wina.sparsify(packed, plan)
    kinds = {type(layer).__name__ for _, layer in sparse_layers(packed)}
    assert kinds == {"SparseLinear", "MaskedPacked"}
    assert torch.equal(packed(ids).logits, dense)
    with masked(untouched, plan) as decoding:
        steps = decode(untouched, ids, decoding)
    torch.testing.assert_close(decode(packed, ids), steps)
    assert not torch.allclose(steps, decode(untouched, ids), atol=1e-2)
    tokens = steps.argmax(-1).tolist()
    assert continue_text(packed, ids) == tokens
    assert generate(packed, ids[0].tolist(), len(tokens)).ids == tokens
    wina.densify(packed)
    assert torch.equal(packed(ids).logits, dense)
    assert [*map(type, packed.modules())] == [*map(type, untouched.modules())]
    assert packed.state_dict().keys() == untouched.state_dict().keys()
    scored = {"name": "x", "tokens": 256, "context": 128, "dense_prefix": 4}
    of_packed, of_plain = (
        evaluate(one, tokenizer, [plan], [text], **scored).results[0] for one in (packed, plain)
    )
    assert of_packed.sparsity == pytest.approx(of_plain.sparsity, abs=1e-3)
    assert of_packed.kl == pytest.approx(of_plain.kl, rel=1e-2)


def test_weights_are_found_by_probing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wina.layers.foreign.CHUNK", 7)
    packed, plain = replaced()
    name = "model.layers.1.mlp.down_proj"
    module = packed.get_submodule(name)
    assert is_foreign(module)
    torch.testing.assert_close(dequantized(module), plain.get_submodule(name).weight)
    # Through the gate of a sparse one too, and without it.
    wina.sparsify(packed, make_plan(packed, 10.0, prefill="sparse"), check=False)
    torch.testing.assert_close(matrix(packed.get_submodule(name)), matrix(module))
    torch.testing.assert_close(probed(module), plain.get_submodule(name).weight)
    assert torch.count_nonzero(module(torch.randn(3, 48)) - (module.bias or 0)) == 0


def test_what_libraries_put_on_the_object_is_called_behind_one_gate() -> None:
    """As compressed-tensors does: forward on the object, that calls the class's."""
    model = make_model("qwen3")
    calls = []

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(x)
        return self.__class__.forward(self, x.round(decimals=1))

    layer = model.model.layers[0].mlp.down_proj
    wanted = layer(torch.full((1, 48), 0.3))
    layer.forward = MethodType(forward, layer)
    wina.sparsify(model, make_plan(model, 0.3, prefill="sparse"), check=False)
    assert isinstance(layer, MaskedLayer)
    x = torch.full((1, 48), 0.32)
    x[:, ::2] = 0.28  # dropped, although it would be rounded to 0.3
    found = layer(x)
    (seen,) = calls
    assert torch.equal(seen, torch.where(x < 0.3, 0, x))
    with torch.no_grad():
        half = torch.full((1, 48), 0.3)
        half[:, ::2] = 0
        torch.testing.assert_close(found, nn.functional.linear(half, layer.weight, layer.bias))
    # What is put there later is called too.
    layer.forward = MethodType(lambda _self, x: x.sum(-1, keepdim=True), layer)
    torch.testing.assert_close(layer(x), x[:, 1::2].sum(-1, keepdim=True))
    del layer.forward
    wina.densify(model)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(torch.full((1, 48), 0.3)), wanted)


def test_offloaded_linears_are_gated() -> None:
    model, untouched, ids = make_model("qwen3"), make_model("qwen3"), prompt(10)
    plan = make_plan(model, 0.4)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    with masked(untouched, plan) as decoding:
        wanted = decode(untouched, ids, decoding)
    wina.sparsify(model, plan, check=False)
    torch.testing.assert_close(decode(model, ids), wanted)
    assert not torch.allclose(wanted, decode(untouched, ids), atol=1e-2)
    wina.densify(model)
    torch.testing.assert_close(decode(model, ids), decode(untouched, ids))


def test_what_is_not_linear_is_refused(text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = replaced(Squared)
    with pytest.raises(wina.UsageError, match=r"Squared .*gate_proj does not compute W x \+ b"):
        wina.calibrate(model, tokenizer, text, **SETTINGS)


def test_plain_linears_and_the_parts_of_others_are_not_foreign() -> None:
    class Own(nn.Linear):
        pass

    adapter = nn.Module()
    adapter.in_features = adapter.out_features = 4
    adapter.base_layer = nn.Linear(4, 4)
    for module in (nn.Linear(4, 4), Own(4, 4), nn.Embedding(4, 4), nn.LayerNorm(4), adapter):
        assert not is_foreign(module)
    model = make_model("qwen3")
    wina.sparsify(model, make_plan(model, 0.3), check=False)
    assert all(type(layer) is SparseLinear for _, layer in sparse_layers(model))
    assert not any(map(is_foreign, model.modules()))


def test_experts_in_bytes_stay_dense() -> None:
    experts = nn.Module()
    experts.has_gate, experts.has_bias, experts.is_transposed = True, False, False
    experts._apply_gate = nn.Identity()
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.zeros(2, 4, 4)
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        assert is_experts(experts) == (name == "down_proj")
    experts.down_proj = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert not is_experts(experts)


def test_identity_knows_packed_weights(model: PreTrainedModel) -> None:
    before = identify(model, "x").weights_hash
    wina.sparsify(model, make_plan(model, 0.3), check=False)
    assert identify(model, "x").weights_hash == before
    model.model.layers[0].mlp.up_proj.codes[0, 0] += 1
    assert identify(model, "x").weights_hash != before


def test_what_needs_the_weight_is_refused(
    model: PreTrainedModel, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def plan_for(sparsity: float) -> Plan:
        raise AssertionError("nothing may be made before the refusal")

    with pytest.raises(wina.UsageError, match="no speed to measure"):
        bench(model, plan_for, BenchSettings(context=16), name="x", method="wina")
    with pytest.raises(wina.UsageError, match="has scales of its own"):
        wina.sparsify(model, make_plan(model, 1.0, keep=0.5), check=False)
    assert phase_of(model) is None
    calibration = wina.calibrate(model, tokenizer, text, **SETTINGS)
    for method in ("wina-paper", "r-sparse", "cats"):
        with pytest.raises(wina.UsageError, match="Load the model dequantized for those"):
            methods.get(method).plan(Setting(model, calibration), 0.3)


def test_top_k_masks_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = replaced()
    for module in packed.modules():
        if isinstance(module, Packed):
            module.scales_of_mine = module.__dict__.pop("scales")
    monkeypatch.setattr(
        Packed,
        "forward",
        lambda self, x: nn.functional.linear(x, self.codes * self.scales_of_mine, self.bias),
    )
    for one in (packed, plain):
        wina.sparsify(one, make_plan(one, 1.0, keep=0.5, prefill="sparse"), check=False)
    ids = prompt()
    torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_sites_are_the_plain_model_s(model: PreTrainedModel) -> None:
    assert find_sites(model) == find_sites(make_model("qwen3"))
