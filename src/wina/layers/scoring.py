"""Run a plan over whole texts, as quality is scored: every position sparse, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from wina.layers.linear import SparseLayer, align, features, matrix, sparse_layers
from wina.layers.phase import Phase
from wina.layers.quantized import Stored, packed, stored
from wina.layers.swap import densify, phase_of, sparsify
from wina.plan import Plan


@contextmanager
def scoring(model: nn.Module, plan: Plan, dense_prefix: int) -> Iterator[Phase]:
    """Make a dense model sparse inside the block, prompt positions too.

    Args:
        model: dense; dense again at the end.
        plan: what to drop.
        dense_prefix: first positions of every text that stay dense.
    """
    phase = sparsify(model, plan)
    phase.prefill, phase.dense_prefix = "sparse", dense_prefix
    try:
        yield phase
    finally:
        densify(model)


class SparsityCounter:
    """Counts dropped channels of a sparse model's layers on sparse positions, as a context.

    Args:
        model: sparse.
        read_weights: read the weights that other libraries quantized, too, to count their bytes;
            otherwise only those that are laid out for the kernels count as quantized.
    """

    def __init__(self, model: nn.Module, read_weights: bool = False) -> None:
        self._model = model
        self._read_weights = read_weights
        self._stored: dict[str, Stored] = {}
        self._dropped: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._shape: dict[str, tuple[int, int]] = {}
        self._skips: dict[str, int] = {}  # weights of another linear that a channel saves
        self._free: dict[str, Tensor] = {}  # kept channels whose column of W is zero
        self._idle: dict[str, Tensor] = {}  # groups of a quantized weight without a kept channel
        self._groups: dict[str, int] = {}

    def __enter__(self) -> SparsityCounter:
        phase = phase_of(self._model)
        self._handles = []
        for name, layer in sparse_layers(self._model):
            self._shape[name] = features(layer)
            self._skips[name] = getattr(layer, "skips", ("", 0))[1]
            found = stored(layer) if self._read_weights or packed(layer) else None
            if found is not None:
                self._stored[name] = found
            self._groups[name] = 0 if found is None else found.groups
            self._handles.append(layer.register_forward_pre_hook(self._observer(name, phase)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _observer(self, name: str, phase: Phase | None) -> Any:
        @torch.no_grad()
        def observe(layer: SparseLayer, args: tuple[Tensor, ...]) -> None:
            rows = True if phase is None else phase.rows
            if rows is False:
                return
            x = args[0]
            seen = x[..., 0].numel()
            counted = align(rows, x) if isinstance(rows, Tensor) else None
            if counted is not None:
                seen = int(counted.sum()) * (seen // len(counted))
            if layer.keep is not None and not layer.has_zero_columns:
                total = torch.tensor(seen * (x.shape[-1] - layer.keep))
            else:
                kept = layer.mask(x) if layer.active else torch.ones_like(x, dtype=torch.bool)
                if counted is not None:
                    kept = kept & counted
                total = seen * x.shape[-1] - kept.sum()
                if self._groups[name]:
                    grouped = kept.reshape(
                        -1, self._groups[name], x.shape[-1] // self._groups[name]
                    )
                    idle = seen * self._groups[name] - grouped.any(-1).sum()
                    self._idle[name] = self._idle.get(name, torch.tensor(0)) + idle.cpu()
                if layer.has_zero_columns:
                    free = (kept & (matrix(layer) == 0).all(0)).sum()
                    self._free[name] = self._free.get(name, torch.tensor(0)) + free.cpu()
            self._dropped[name] = self._dropped[name] + total if name in self._dropped else total
            self._rows[name] = self._rows.get(name, 0) + seen

        return observe

    def by_linear(self) -> dict[str, float]:
        """Return the share of input channels that each linear dropped."""
        return {
            name: int(total) / max(1, self._rows[name] * self._shape[name][0])
            for name, total in self._dropped.items()
        }

    def idle_groups(self) -> dict[str, float]:
        """Return the share of groups of quantized weights whose scales were not read either."""
        return {
            name: int(idle) / max(1, self._rows[name] * self._groups[name])
            for name, idle in self._idle.items()
        }

    @property
    def weights(self) -> tuple[int, int]:
        """Weights not touched, and all weights, over all counted linears and positions."""
        saved = spent = 0
        for name, total in self._dropped.items():
            in_features, out_features = self._shape[name]
            saved += int(total) * (out_features + self._skips[name])
            spent += self._rows[name] * in_features * out_features
        return saved, spent

    @property
    def sparsity(self) -> float:
        """Share of weights not touched, over all counted linears and positions."""
        saved, spent = self.weights
        return saved / max(1, spent)

    def bytes_read(self, width: int) -> float:
        """Return the bytes of weights read for a token: of channels that are kept and not zero.

        Scales of a quantized weight's group count if any of its channels is kept.

        Args:
            width: bytes of a weight that is not quantized.
        """
        tokens = max(1, *self._rows.values())
        shares, idle = self.by_linear(), self.idle_groups()
        total = 0.0
        for name, dropped in self._dropped.items():
            in_features, out_features = self._shape[name]
            found = self._stored.get(name)
            if found is not None:
                size = found.bytes_read(shares[name], idle.get(name, 0.0))
                total += size * self._rows[name] / tokens
                continue
            spent = self._rows[name] * in_features * out_features
            saved = int(dropped) * (out_features + self._skips[name])
            saved += int(self._free.get(name, 0)) * out_features
            total += (spent - saved) * width / tokens
        return total
