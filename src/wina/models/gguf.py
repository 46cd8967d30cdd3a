"""Keep the codes of a GGUF file beside the floats that Transformers makes of them.

Of linears stored as Q4_0, Q4_1 or Q8_0 the file's own blocks of 32 are laid out for the kernels,
exactly: the weights are those that were calibrated, in a quarter of the bytes. Other types (5 bits
and 6, or scales of scales) have no such layout, and their linears keep their floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina.errors import UsageError
from wina.kernels import QuantizedWeight, pack
from wina.kernels.cpu import Arena
from wina.kernels.quantized import dequantize
from wina.layers.quantized import store, store_dense
from wina.models.structure import find_sites

GROUP = 32
TYPES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # bytes of a block


@torch.no_grad()
def keep_codes(model: PreTrainedModel, path: Path) -> int:
    """Lay out the codes of the linears and the head of a model read from a GGUF file.

    Args:
        model: dense, as Transformers dequantized it.
        path: of the file.

    Returns:
        How many linears of the blocks have codes now.

    Raises:
        UsageError: none has.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = str(reader.get_field("general.architecture").contents())
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)

    def stored(name: str) -> Any:
        found = names.get_name(name)
        return None if found is None else tensors.get(f"{found}.weight")

    kept, arena = 0, Arena()
    for site in find_sites(model):
        module = model.get_submodule(site.name)
        weight = _weight(stored(site.name), module, model, arena)
        if weight is not None:
            store(module, weight)
            kept += 1
    if not kept:
        raise UsageError(f"{path.name} has no linear of the types {', '.join(TYPES)}")
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        own = tensors.get("output.weight") or tensors.get("token_embd.weight")
        weight = _weight(own, head, model, arena)
        if weight is not None:
            store_dense(head, weight)
    return kept


def _weight(
    tensor: Any, module: nn.Module, model: PreTrainedModel, arena: Arena
) -> QuantizedWeight | None:
    """Return a tensor of the file as a weight, its rows in the order of the module's."""
    own = module._parameters.get("weight")
    if tensor is None or tensor.tensor_type.name not in TYPES or own is None:
        return None
    codes, scales, minima, bits = _codes(tensor)
    if codes.shape != own.shape:
        return None
    for order in _orders(model, len(codes)):
        zeros = None if minima is None else minima[order]
        weight = pack(codes[order], scales[order], zeros, bits, arena)
        if torch.equal(dequantize(weight).to(own.dtype), own):
            return weight
    return None


def _codes(tensor: Any) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return codes (out, in), scales and minima (out, groups) of a tensor, and the codes' bits."""
    kind = tensor.tensor_type.name
    blocks = torch.from_numpy(tensor.data.copy()).view(torch.uint8)
    blocks = blocks.reshape(int(tensor.shape[1]), -1, TYPES[kind])

    def half(place: int) -> Tensor:
        return blocks[..., place : place + 2].contiguous().view(torch.float16)[..., 0]

    if kind == "Q8_0":
        return blocks[..., 2:].contiguous().view(torch.int8).flatten(1), half(0), None, 8
    nibbles = blocks[..., TYPES[kind] - GROUP // 2 :]
    codes = torch.cat((nibbles & 15, nibbles >> 4), -1).to(torch.int8) - 8
    return codes.flatten(1), half(0), half(2) if kind == "Q4_1" else None, 4


def _orders(model: PreTrainedModel, rows: int) -> Iterator[Tensor]:
    """Yield orders of a tensor's rows: as they are, or with a head's neighbours rotated apart."""
    yield torch.arange(rows)
    config = model.config.get_text_config()
    for heads in (config.num_attention_heads, config.num_key_value_heads):
        if rows % (2 * heads) == 0:
            yield torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).flatten()
