"""Codes of compressed-tensors as the kernels want them, without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.helpers import VOCABULARY
from tests.integrations.compressed import integers, write
from wina.errors import UsageError
from wina.integrations.vllm.compressed import METHOD, check_base, projections, unpack_codes
from wina.kernels.quantized import dequantize


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return rows of codes in int32, the first in the lowest bits."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % each))
    words = (codes + (1 << (bits - 1))).unflatten(1, (-1, each)) << bits * torch.arange(each)
    whole = words.sum(-1)
    return (whole - ((whole >> 31) << 32)).to(torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 8, 64, 101])
def test_codes_are_unpacked(bits: int, count: int) -> None:
    bound = 1 << (bits - 1)
    codes = torch.randint(-bound, bound, (5, count))
    codes[:, 0] = torch.tensor([-bound, -1, 0, 1, bound - 1])
    found = unpack_codes(pack(codes, bits), bits, count)
    assert found.dtype == torch.int8
    assert torch.equal(found.long(), codes)


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, None), (8, 32), (8, None)])
def test_weights_are_the_librarys(
    bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    """Read from its file, beside what it unpacks itself."""
    pytest.importorskip("compressed_tensors")
    model: Any = tiny()
    write(model, tmp_path, integers(bits, group, symmetric))
    held = load_file(tmp_path / "model.safetensors")
    model(torch.tensor([[1, 2]]))  # unpacks
    attention = model.model.layers[0].self_attn
    wanted = [getattr(attention, f"{name}_proj").weight for name in "qkv"]

    def fused(kind: str) -> Tensor | None:
        names = [f"model.layers.0.self_attn.{name}_proj.{kind}" for name in "qkv"]
        return torch.cat([held[name] for name in names]) if names[0] in held else None

    packed, scales, zeros = map(fused, ("weight_packed", "weight_scale", "weight_zero_point"))
    assert packed is not None
    assert scales is not None
    assert (zeros is None) == symmetric
    found = projections(packed, scales, zeros, 64, [64, 32, 32], bits)
    assert [weight.shape for weight in found] == [(64, 64), (32, 64), (32, 64)]
    assert {weight.bits for weight in found} == {bits}
    for weight, matrix in zip(found, wanted, strict=True):
        assert_close(dequantize(weight), matrix.detach(), rtol=1e-6, atol=1e-7)
    assert tiny().model.layers[0].self_attn.q_proj.weight.sub(wanted[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by another method, gptq"),
        ({"quant_method": METHOD, "kv_cache_scheme": {"num_bits": 8}}, "keys and values"),
        ({"quant_method": METHOD, "transform_config": {"a": 1}}, "inputs are transformed"),
        ({"quant_method": METHOD, "quantization_status": "decompressed"}, "compress_model"),
    ],
)
def test_models_that_are_refused(config: dict[str, Any], message: str) -> None:
    check_base({"quant_method": METHOD, "kv_cache_scheme": None, "transform_config": {}})
    with pytest.raises(UsageError, match=message):
        check_base(config)
