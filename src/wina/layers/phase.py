"""Which positions of the running forward pass are sparse.

Prefill is the positions of the prompt, decode the positions after it. The meaning of a plan never
depends on batch size, kernel or engine: a position is sparse or it is not, and all sparse layers
of a model share one Phase that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Mode = Literal["dense", "sparse"]


class Phase:
    """The state that the sparse layers of one model share.

    Attributes:
        prefill: "dense" leaves calls with more than one position, and the first position of a
            sequence, as they are; "sparse" treats every position alike.
        dense_prefix: with sparse prefill, the number of first positions that stay dense.
        rows: True if every position of the running call is sparse, False if none is, or a
            boolean tensor of shape (positions,).
        check: called when a prompt comes; None calls nothing.
    """

    def __init__(self, prefill: Mode = "dense", dense_prefix: int = 0) -> None:
        self.prefill = prefill
        self.dense_prefix = dense_prefix
        self.rows: bool | Tensor = True
        self.handle: RemovableHandle | None = None
        self.undo: Callable[[], None] = lambda: None  # takes away what wina.layers.extras installed
        self.check: Callable[[], None] | None = None
        self._forced: bool | None = None

    def observe(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: set ``rows`` from the call's length and its cache."""
        if self._forced is not None:
            self.rows = self._forced
            return
        # Some models pass the ids by position, and inputs_embeds=None beside them.
        candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        inputs = next((x for x in candidates if x is not None), None)
        if inputs is None:
            self.rows = True
            return
        if self.check is not None and inputs.shape[1] > 1 and not torch.compiler.is_compiling():
            self.check()
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        self.rows = self._rows(inputs.shape[1], past, inputs.device)

    def _rows(self, positions: int, past: int | Tensor, device: torch.device) -> bool | Tensor:
        if self.prefill == "dense":
            # A static cache holds its length in a tensor; reading it would wait for the device,
            # and one position with such a cache is a decode step.
            return positions == 1 and (isinstance(past, Tensor) or past > 0)
        if self.dense_prefix == 0:
            return True
        if isinstance(past, Tensor):
            return torch.arange(positions, device=device) + past >= self.dense_prefix
        if past >= self.dense_prefix:
            return True
        if past + positions <= self.dense_prefix:
            return False
        return torch.arange(past, past + positions, device=device) >= self.dense_prefix

    @contextmanager
    def force(self, mode: Mode) -> Iterator[None]:
        """Make every position of every call sparse, or dense, inside the block."""
        before = self._forced, self.rows
        self._forced = self.rows = mode == "sparse"
        try:
            yield
        finally:
            self._forced, self.rows = before
