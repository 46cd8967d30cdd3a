"""Checkpoints as compressed-tensors' own library writes them, rounded to nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel


def write(model: PreTrainedModel, folder: Path, scheme: Any, form: str = "pack-quantized") -> None:
    """Compress a model in place, its head left out, and write it.

    Args:
        model: in float32.
        folder: is made.
        scheme: a QuantizationScheme for all other linears.
        form: of the codes.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig(
        config_groups={"all": scheme},
        ignore=["lm_head"],
        format=form,
        quantization_status="frozen",
    )
    apply_quantization_config(model, config)
    is_float = scheme.weights.type == "float"
    largest = 448 if is_float else 2 ** (scheme.weights.num_bits - 1) - 1
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        scale, zero = module.weight_scale.data, getattr(module, "weight_zero_point", None)
        groups = module.weight.detach().reshape(*scale.shape, -1)
        if scheme.weights.symmetric or zero is None:
            scale.copy_(groups.abs().amax(-1) / largest)
            continue
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale.copy_((high - low) / (2 * largest + 1))
        zero.data.copy_(-largest - 1 - (low / scale).round())
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.config.save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: x.contiguous() for name, x in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(folder)


def integers(bits: int, group: int | None, symmetric: bool = True) -> Any:
    """Return the scheme of weights alone in so many bits; without a group: one for each output."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "channel" if group is None else "group"
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)
