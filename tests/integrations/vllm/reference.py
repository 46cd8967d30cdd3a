"""What Transformers says at each position, with given tokens forced on it; many texts at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from wina.layers.linear import sparse_layers

EVERY = 191  # as in forcing, which cannot be imported without vLLM
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block, (heads, positions, size)


@torch.inference_mode()
def prefill(model: Any, ids: list[int]) -> tuple[Tensor, Cache]:
    """Return the logits at each position of a prompt, and its keys and values."""
    out = model(torch.tensor([ids]), use_cache=True)
    layers = out.past_key_values.layers
    return out.logits[0], [(layer.keys[0], layer.values[0]) for layer in layers]


def cut(cache: Cache, count: int) -> Cache:
    """Return the first ``count`` positions of a cache."""
    return [(keys[:, :count], values[:, :count]) for keys, values in cache]


@torch.inference_mode()
def decode(
    model: Any, caches: list[Cache], logits: Tensor, forced: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """Return the best tokens, (texts, count), and some of their logits, (texts, count, some).

    Args:
        model: Transformers'.
        caches: of each text so far.
        logits: at its end, shape (texts, vocabulary).
        forced: tokens to go on with, shape (texts, count); None for the model's own.
        count: of tokens.
    """
    lengths = torch.tensor([cache[0][0].shape[1] for cache in caches])
    longest = int(lengths.max())

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.stack([pad(part, (0, 0, longest - part.shape[1], 0)) for part in parts])

    cache = DynamicCache()
    for block in range(len(caches[0])):
        keys, values = ([one[block][which] for one in caches] for which in (0, 1))
        cache.update(joined(keys), joined(values), block)
    mask = (torch.arange(longest)[None] >= longest - lengths[:, None]).long()
    best, kept = [logits.argmax(-1)], [logits[:, ::EVERY].clone()]
    for place in range(count - 1):
        token = best[-1] if forced is None else forced[:, place]
        mask = pad(mask, (0, 1), value=1)
        logits = model(
            token[:, None],
            past_key_values=cache,
            attention_mask=mask,
            position_ids=(lengths + place)[:, None],
        ).logits[:, -1]
        best.append(logits.argmax(-1))
        kept.append(logits[:, ::EVERY].clone())
    return torch.stack(best, 1), torch.stack(kept, 1)


@contextmanager
def noise(model: nn.Module, size: float, seed: int = 0) -> Iterator[None]:
    """Perturb the input of each sparse layer by a relative error inside the block."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        return (x * (1 + size * torch.randn(x.shape, generator=generator)),)

    handles = [layer.register_forward_pre_hook(perturb) for _, layer in sparse_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of single positions that some layers get inside the block."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            if args[0].shape[1] == 1:
                seen[name].append(args[0][:, 0].clone())

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
