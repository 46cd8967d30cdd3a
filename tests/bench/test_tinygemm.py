"""The tinygemm baseline: the same weights, by torch's own 4-bit product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wina.bench.tinygemm import TinygemmLinear, unavailable, use_tinygemm
from wina.kernels.quantized import QuantizedWeight, dequantize, pack
from wina.models import find_sites


def weight_of(zeros: str, out: int = 96, width: int = 1024, group: int = 128) -> QuantizedWeight:
    torch.manual_seed(0)
    shape = (out, width // group)
    given: dict[str, Tensor | None] = {
        "none": None,
        "points": torch.randint(-8, 8, shape).to(torch.int8),
        "minima": torch.randn(shape).bfloat16(),
    }
    scales = (torch.rand(shape) + 0.1).bfloat16()
    return pack(torch.randint(-8, 8, (out, width)), scales, given[zeros], 4)


def check(weight: QuantizedWeight, device: str) -> None:
    x, bias = torch.randn(2, 3, weight.shape[1]).bfloat16(), torch.randn(weight.shape[0]).bfloat16()
    exact = x.double() @ dequantize(weight).double().t() + bias
    placed = QuantizedWeight(*(tensor.to(device) for tensor in weight))
    found = TinygemmLinear(placed, bias.to(device))(x.to(device)).cpu()
    assert found.shape == exact.shape
    assert float((found - exact).norm() / exact.norm()) < 0.005


@pytest.mark.parametrize("zeros", ["none", "points", "minima"])
def test_the_product_is_that_of_the_dequantized_weight(zeros: str) -> None:
    check(weight_of(zeros), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", ["none", "points", "minima"])
def test_on_a_device(zeros: str) -> None:
    check(weight_of(zeros), "cuda")
    check(weight_of(zeros, 4096, 4096), "cuda")


def test_a_model_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    from transformers import LlamaConfig, LlamaForCausalLM

    from wina.models.quantize import Scheme, quantize

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    assert "of 4-bit codes" in str(unavailable(model))
    quantize(model, Scheme.parse("int4-g128"))
    assert unavailable(model) is None
    ids = torch.randint(64, (1, 12))
    wanted = model(ids).logits
    sites = find_sites(model)
    use_tinygemm(model)
    for site in sites:
        assert isinstance(model.get_submodule(site.name), TinygemmLinear)
    found = model(ids).logits
    assert float(((found - wanted).norm() / wanted.norm()).detach()) < 0.02
