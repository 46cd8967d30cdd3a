"""KL(dense || sparse) over the vocabulary, with its gradient made along the way.

Autograd would keep several float32 copies of the logits, the largest tensors of all; here there
is one chunk of positions at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 1 << 26  # logits in float32 at once: 256 MiB


class Divergence(torch.autograd.Function):
    """logits, dense logits -> summed KL in nats; the dense logits' memory holds the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor) -> Tensor:
        """Return the sum over positions.

        Args:
            ctx: autograd's.
            logits: the sparse model's, shape (positions, vocabulary), any float dtype.
            dense: the dense model's, the same shape and dtype; overwritten.
        """
        total = torch.zeros((), device=logits.device)
        step = max(1, CHUNK // logits.shape[-1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            log_p = logits[part].float().log_softmax(-1)
            log_q = dense[part].float().log_softmax(-1)
            total += functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
            dense[part] = log_p.exp_().sub_(log_q.exp_())
        ctx.save_for_backward(dense)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return softmax(sparse) - softmax(dense), scaled."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Return the summed KL(dense || sparse) in nats, shape (); ``dense`` is overwritten."""
    total: Tensor = Divergence.apply(logits, dense)  # type: ignore[no-untyped-call]
    return total
