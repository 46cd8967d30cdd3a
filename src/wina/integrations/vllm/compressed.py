"""Checkpoints of compressed-tensors: which of them serve, and their codes as the kernels want them.

A weight is ``weight_packed`` (int32, the codes of consecutive inputs from the lowest bits on, each
as an unsigned number), ``weight_scale``, one for each output and group of inputs, and, where the
format has zero points, ``weight_zero_point`` (int32, packed along the outputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wina.errors import UsageError
from wina.kernels import QuantizedWeight, pack

METHOD = "compressed-tensors"
BITS = (4, 8)
ALSO = {  # what a config may have beside its weights' format
    "kv_cache_scheme": "keys and values are quantized too",
    "transform_config": "inputs are transformed",
    "sparsity_config": "weights are sparse in themselves",
}


def check_base(config: Mapping[str, Any]) -> None:
    """Raise UsageError unless wina runs on top of a model's ``quantization_config`` in vLLM.

    What formats its layers have is seen as they are built.
    """
    method = config.get("quant_method")
    if method != METHOD:
        raise UsageError(
            f"the model's weights are quantized by another method, {method}, which wina does not "
            f"run in vLLM; it runs {METHOD}' codes of 4 or 8 bits, and weights as they are"
        )
    if config.get("quantization_status") == "decompressed":
        raise UsageError(
            "Transformers had unpacked this model's weights when it was saved; call "
            "model.hf_quantizer.compressor.compress_model(model) before save_pretrained, or keep "
            "the model as it was and a plan beside it (--plan)"
        )
    for name, reason in ALSO.items():
        if config.get(name):
            raise UsageError(
                f"{reason} in this model ({name} of its {METHOD} config), which wina does not run "
                "in vLLM"
            )


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return codes as signed numbers, shape (rows, count), int8.

    Args:
        packed: shape (rows, words), int32.
        bits: of a code: 4 or 8.
        count: of codes in a row; what words hold beyond is padding.
    """
    whole = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return (whole ^ 128).view(torch.int8)[:, :count]
    halves = torch.stack((whole & 15, whole >> 4), -1).flatten(1)
    return halves[:, :count].to(torch.int8) - 8


def projections(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    inputs: int,
    sizes: Sequence[int],
    bits: int,
) -> list[QuantizedWeight]:
    """Return the weights of the projections of a fused layer, laid out for the kernels.

    Args:
        packed: of all projections, one below the other, shape (outputs, words), int32.
        scales: shape (outputs, groups), likewise; float32, float16 or bfloat16.
        zeros: zero points, packed, shape (words, groups), int32; None where there are none.
        inputs: of the layer.
        sizes: outputs of each projection.
        bits: of a code.
    """
    outputs = sum(sizes)
    codes = torch.split(unpack_codes(packed, bits, inputs), list(sizes))
    each = torch.split(scales, list(sizes))
    points: Sequence[Tensor | None] = [None] * len(sizes)
    if zeros is not None:
        points = torch.split(unpack_codes(zeros.t(), bits, outputs).t(), list(sizes))
    return [pack(*one, bits) for one in zip(codes, each, points, strict=True)]
