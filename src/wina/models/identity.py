"""A model's identity: hashes that do not depend on where it was loaded from, or how.

config_hash is the SHA-256 of those config values that fix the function computed, in sorted JSON.
weights_hash is the SHA-256 over the sorted lines "name shape digest" of all parameters, each
digest the SHA-256 of the parameter's values rounded to bfloat16, values below 2**-14 as zero:
float32, bfloat16 and float16 copies of one bfloat16 or quantized checkpoint agree. (A checkpoint
stored in float32 and loaded in float16 is rounded twice and may differ.) Of a model that another
library quantized, the buffers of its linears go in too; what is not a float goes in as its bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from wina.errors import UsageError
from wina.files import cached, write_text
from wina.layers.foreign import plain_weight
from wina.layers.linear import is_read_by_others, sparse_layers
from wina.layers.quantized import BUFFERS
from wina.models.loading import skeleton
from wina.plan import ModelIdentity

CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
)
LARGEST_ZEROED = 2.0**-14 * (1 - 2.0**-8)  # the bfloat16 below float16's smallest normal number
CHUNK = 1 << 20  # values
THREADS = min(16, os.cpu_count() or 1)


def identify(model: PreTrainedModel, name: str, revision: str | None = None) -> ModelIdentity:
    """Return the identity of ``model``, whose weights are all read (about 1 GB/s a core)."""
    settle(model)
    return ModelIdentity(
        name=name,
        revision=revision,
        config_hash=config_hash(model.config),
        weights_hash=_weights_hash(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def config_hash(config: Any) -> str:
    """Return the hash of a Transformers config."""
    text = config.get_text_config()
    facts = {key: getattr(text, key, None) for key in CONFIG_KEYS}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def files_hash(folder: Path, config: Any) -> str | None:
    """Return ``identify``'s weights_hash from a folder's safetensors files; no model is loaded.

    None where they hold other tensors than the parameters of Transformers' model, by name and
    shape, or there are none: families whose checkpoints are stored otherwise, quantized ones.
    The cache keeps it by the files' paths, sizes and times of change, so they are read once.
    """
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"].values() if index.exists() else ()
    files = [folder / name for name in sorted(set(places) or {"model.safetensors"})]
    if not all(file.exists() for file in files):
        return None
    try:
        model = skeleton(config)
    except UsageError:
        return None
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    others = model.state_dict().keys() - wanted.keys()  # tied
    held: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in set(opened.keys()) - others:
                held[name] = file, opened.get_slice(name).get_shape()
    if {name: shape for name, (_, shape) in held.items()} != wanted:
        return None

    def digest(name: str) -> str:
        with safe_open(held[name][0], framework="pt") as opened:
            return _digest(opened.get_tensor(name))

    names = sorted(wanted)
    kept = _kept_hash(files, names)
    with suppress(OSError, ValueError):
        found = kept.read_text(encoding="ascii")
        if len(found) == len(bytes.fromhex(found)) * 2 == 64:  # a power cut may leave it empty
            return found
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(digest, names))
    total = _total(zip(names, (wanted[name] for name in names), digests, strict=True))
    with suppress(OSError):  # a cache that cannot be written
        write_text(kept, total)
    return total


def _kept_hash(files: Sequence[Path], names: Sequence[str]) -> Path:
    """Return where the cache keeps the hash of some tensors in files as they are now."""
    found = [(str(file.resolve()), file.stat()) for file in files]
    facts = [[path, state.st_size, state.st_mtime_ns] for path, state in found]
    key = hashlib.sha256(json.dumps([facts, names]).encode()).hexdigest()[:24]
    return cached("weights", key)


@torch.no_grad()
def settle(model: PreTrainedModel) -> None:
    """Let a model quantized by another library do what it puts off until its first call.

    Weights that are stored packed may be unpacked then, and others brought into their layout.
    """
    if _is_quantized(model):
        model(torch.tensor([[0, 1]], device=model.device), use_cache=False)


def _is_quantized(model: nn.Module) -> bool:
    return any(is_read_by_others(x) and plain_weight(x) is None for x in model.modules())


def _weights_hash(model: nn.Module) -> str:
    tensors: list[tuple[str, torch.Tensor]] = sorted(model.named_parameters())
    if _is_quantized(model):
        # Not state_dict: asking for it makes some of them convert their weights, with losses.
        ours = {f"{name}.{layer.vector_name}" for name, layer in sparse_layers(model)}
        extra = ("sparse_bias", *BUFFERS)
        ours |= {f"{name}.{buffer}" for name, _ in sparse_layers(model) for buffer in extra}
        kept = {name for name, module in model.named_modules() if is_read_by_others(module)}
        tensors += sorted(
            (name, buffer)
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[0] in kept and name not in ours
        )
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(_digest, (tensor for _, tensor in tensors))
        return _total((name, x.shape, y) for (name, x), y in zip(tensors, digests, strict=True))


def _total(lines: Iterable[tuple[str, Iterable[int], str]]) -> str:
    total = hashlib.sha256()
    for name, shape, digest in lines:
        total.update(f"{name} {list(shape)} {digest}\n".encode())
    return total.hexdigest()


@torch.no_grad()
def _digest(tensor: torch.Tensor) -> str:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # a tensor made of others
        return " ".join(_digest(getattr(tensor, name)) for name in flatten()[0])
    digest = hashlib.sha256()
    if not tensor.is_floating_point():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
    for chunk in torch.split(tensor.detach().flatten(), CHUNK):
        rounded = functional.hardshrink(chunk.to(torch.bfloat16).cpu(), LARGEST_ZEROED)
        digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()
