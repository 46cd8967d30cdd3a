"""Notice that the weights under a plan have changed, as when an adapter is merged into them.

A plan's thresholds belong to the weights that it was calibrated on. What changes weights in place
leaves no trace that torch shows, so a few numbers of every sparse layer's weight are remembered,
and compared when a prompt comes: one small copy to the host, for every prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from wina.layers.linear import SparseLayer, matrix

NUMBERS = 4  # of a layer


class ChangedWeightsWarning(UserWarning):
    """Weights changed after ``wina.sparsify``."""


class Watch:
    """The layers that share a phase, and what their weights began with."""

    def __init__(self, layers: Sequence[tuple[str, SparseLayer]]) -> None:
        # One projection stands for all those of a layer's experts, whose parameter is one.
        own = [(name, x) for name, x in layers if x.kernels]
        parts = {id(getattr(x, "owner", x)): (name, x) for name, x in own}
        self._layers = list(parts.values())
        self._before = self._sample()
        self._warned = False

    def look(self) -> None:
        """Warn, once, if a weight is not what it was."""
        now = self._sample()
        before = self._before
        if now is None or before is None or now.dtype != before.dtype:
            self._before = now  # converted since, or not here; start anew
            return
        changed = (now != before).any(1).tolist()
        if self._warned or not any(changed):
            return
        self._warned = True
        warnings.warn(
            f"the weights of {sum(changed)} sparse layers, such as "
            f"{self._layers[changed.index(True)][0]}, are not those that the plan was applied to "
            "(an adapter merged into them, or training): its thresholds do not fit them. Call "
            "wina.densify(model), calibrate the model as it is now and plan again.",
            ChangedWeightsWarning,
            stacklevel=2,
        )

    @torch.no_grad()
    def _sample(self) -> Tensor | None:
        """Return NUMBERS numbers of each layer, on the CPU; None if weights are elsewhere."""
        weights = [matrix(layer) for _, layer in self._layers]
        if not weights or any(x.is_meta or x.device != weights[0].device for x in weights):
            return None
        if any(x.dtype != weights[0].dtype for x in weights):
            return None
        width = min(x.shape[1] for x in weights)
        return torch.stack([x[0, : min(NUMBERS, width)] for x in weights]).cpu()
