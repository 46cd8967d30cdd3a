"""The dense 4-bit baseline: torch's own product of 16-bit rows and 4-bit weights (tinygemm).

It is what torchao's ``Int4WeightOnlyConfig`` runs on a CUDA device. The codes, scales and zero
points are those of the quantized model itself, re-laid out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina.kernels import QuantizedWeight
from wina.kernels.quantized import unpack
from wina.layers.layout import lay_out_for_decode
from wina.layers.quantized import read
from wina.models import find_sites

TILES = 8  # of 16 inputs, side by side in the layout
GROUPS = (32, 64, 128, 256)
OPS = torch.ops.aten


class TinygemmLinear(nn.Module):
    """W x + b with W of 4 bits, in bfloat16."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Lay a weight out for tinygemm.

        Args:
            weight: of 4 bits.
            bias: (out_features,), bfloat16.
        """
        super().__init__()
        self.group = weight.group_size
        codes = (unpack(weight) + 8).to(torch.int32)
        if codes.device.type == "cpu":
            made = OPS._convert_weight_to_int4pack_for_cpu(codes, TILES)
        else:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
            made = OPS._convert_weight_to_int4pack(pairs, TILES)
        # W is (code of 0 to 15 - 8) scale + shift.
        scales, shift = weight.scales.float(), torch.zeros_like(weight.scales, dtype=torch.float32)
        if weight.zeros.numel():
            zeros = weight.zeros.float()
            shift = 8 * scales + zeros if weight.zeros.is_floating_point() else -zeros * scales
        self.register_buffer("packed", made)
        self.register_buffer("scales", torch.stack((scales, shift), -1).bfloat16().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b, shape (..., out_features), for x of (..., in_features) in bfloat16."""
        name = "_weight_int4pack_mm"
        multiply = getattr(OPS, f"{name}_for_cpu" if x.device.type == "cpu" else name)
        rows = x.reshape(-1, x.shape[-1])
        found: Tensor = multiply(rows, self.packed, self.group, self.scales)
        if self.bias is not None:
            found = found + self.bias
        return found.reshape(*x.shape[:-1], -1)


def unavailable(model: PreTrainedModel) -> str | None:
    """Return None, or why tinygemm cannot take a quantized model's linears."""
    sites = find_sites(model)
    first = read(model.get_submodule(sites[0].name)) if sites else None
    if first is None or first.bits != 4 or first.group_size not in GROUPS:
        return f"of 4-bit codes in groups of {', '.join(map(str, GROUPS))} only"
    if any(site.in_features % (16 * TILES) or site.out_features % 16 for site in sites):
        return f"of multiples of {16 * TILES} inputs and 16 outputs only"
    return None if model.dtype == torch.bfloat16 else "in bfloat16 only"


def use_tinygemm(model: PreTrainedModel) -> None:
    """Replace, in place, the blocks' linears by tinygemm's; the head goes through wina's kernel.

    Args:
        model: dense and quantized; ``unavailable`` must be None.
    """
    for site in find_sites(model):
        module = model.get_submodule(site.name)
        weight = read(module)
        assert weight is not None
        bias = getattr(module, "bias", None)
        model.set_submodule(site.name, TinygemmLinear(weight, bias))
    lay_out_for_decode(model)
