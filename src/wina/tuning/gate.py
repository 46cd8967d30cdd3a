"""The straight-through gate: hard forward, soft backward.

Forward keeps channel j of a row iff |x_j| >= t_j. Backward treats the gate as sigmoid(z / T),
z = log|x_j| - log t_j, for the thresholds' gradient only (Bengio et al., 2013, arXiv 1308.3432);
x gets the gradient of the channels that stayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wina.layers.linear import align
from wina.progress import note

TINY = 1e-30


@dataclass
class GateState:
    """What all gates of one forward and backward pass share.

    Attributes:
        rows: which positions are sparse, shape (positions,), bool.
        temperature: width of the soft gate in units of log|x|.
        dropped: number of dropped channels by linear, shape (linears,), float32; added to in
            backward.
        density: d(number of dropped channels)/d(log t_j), flat over all linears; added to in
            backward.
    """

    rows: Tensor
    temperature: float
    dropped: Tensor
    density: Tensor

    def reset(self) -> None:
        """Count from zero again."""
        self.dropped.zero_()
        self.density.zero_()


class StraightThrough(torch.autograd.Function):
    """x, log t -> x with dropped channels zero, on sparse rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_t: Tensor, state: GateState, index: int, first: int
    ) -> Tensor:
        """Return the gated input; ``index`` is the linear's, ``first`` its first flat channel."""
        ctx.save_for_backward(x, log_t)
        ctx.state, ctx.index, ctx.first = state, index, first
        gated: Tensor = _fused(_forward, x.is_cuda)(x, log_t, align(state.rows, x))
        return gated

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of x and of log t, and count into the state."""
        x, log_t = ctx.saved_tensors
        state: GateState = ctx.state
        for_x, for_log_t, density, dropped = _fused(_backward, x.is_cuda)(
            x, log_t, align(state.rows, x), gradients[0], state.temperature
        )
        state.dropped[ctx.index] += dropped
        state.density[ctx.first : ctx.first + len(log_t)] += density
        return for_x, for_log_t, None, None, None


def _forward(x: Tensor, log_t: Tensor, rows: Tensor) -> Tensor:
    return x.masked_fill((x.abs().float() < log_t.exp()) & rows, 0)


def _backward(
    x: Tensor, log_t: Tensor, rows: Tensor, gradient: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    magnitudes = x.abs().float()
    below = (magnitudes < log_t.exp()) & rows
    soft = torch.sigmoid(((magnitudes + TINY).log() - log_t) / temperature)
    slope = soft * (1 - soft) / temperature * rows
    dimensions = tuple(range(x.dim() - 1))
    for_log_t = -(x.float() * gradient.float() * slope).sum(dimensions)
    return (
        gradient.masked_fill(below, 0),
        for_log_t,
        slope.sum(dimensions),
        below.sum(dtype=torch.float32),
    )


@cache
def _fused(function: Callable[..., Any], cuda: bool) -> Callable[..., Any]:
    """Return the function, on CUDA compiled: a dozen passes over x become one or two."""
    if not cuda:
        return function
    chosen = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*arguments)
        except Exception as error:  # compilers fail in many ways, one of them being absent
            if chosen is function:
                raise
            note(f"tuning goes on uncompiled, slower: {error}")
            chosen = function
            return chosen(*arguments)

    return call
