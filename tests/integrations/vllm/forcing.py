"""In an engine's process: force given tokens, and keep what the model said at each position.

Two engines that write different tokens can only be compared up to the first one. With the same
tokens forced on both, every position has the same prefix, and caches hold the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

EVERY = 191  # logits of each so manieth token are kept
SAID: dict[tuple[int, int], tuple[int, Tensor]] = {}  # request, position: the best, some logits


class Forcing(LogitsProcessor):  # type: ignore[misc]
    """Reads ``extra_args`` of a request's sampling: its ``number`` and its ``forced`` tokens."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._requests: dict[int, tuple[dict[str, Any], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Allow any."""

    def is_argmax_invariant(self) -> bool:
        """Say that greedy tokens change."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow which request is in which row."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, params, _, written in batch_update.added:
            self._requests[row] = (params.extra_args or {}, written)
        for first, second, how in batch_update.moved:
            one, other = self._requests.pop(first, None), self._requests.pop(second, None)
            if one is not None:
                self._requests[second] = one
            if other is not None and how.name == "SWAP":
                self._requests[first] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Keep the logits, then leave only the forced token possible."""
        for row, (asked, written) in self._requests.items():
            place, forced = len(written), asked.get("forced")
            if forced is None or row >= len(logits) or place >= len(forced):
                continue
            own = logits[row].float()
            SAID[asked["number"], place] = (int(own.argmax()), own[::EVERY].clone())
            logits[row] = -torch.inf
            logits[row, forced[place]] = 0
        return logits


def said(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return and forget the best tokens, (count, length), and the logits kept, (..., some)."""
    places = [[SAID[number, place] for place in range(length)] for number in range(count)]
    SAID.clear()
    best = torch.tensor([[one for one, _ in row] for row in places])
    return best, torch.stack([torch.stack([logits for _, logits in row]) for row in places])


def keep_inputs() -> list[Tensor]:
    """Return a list that gets the sparse rows of each sparse layer's input from now on."""
    from wina.integrations.vllm import ops

    seen: list[Tensor] = []
    # Python is asked from now on, not the library that it stands in for.
    ops.BATCH.started = lambda: ops.library.serve_batch(False)
    original = ops._sparse

    def watched(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.clone())
        return original(x, *rest)

    ops._sparse = watched  # type: ignore[assignment]
    return seen


def scale_one_shard(worker: Any) -> None:
    """Break the plan in one place: the thresholds of k in the fourth block."""
    layers = dict(worker.get_model().named_modules())
    layers["model.layers.3.self_attn.qkv_proj"].thresholds[1] *= 1.5
