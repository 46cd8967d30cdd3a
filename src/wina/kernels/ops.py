"""The kernels as torch operators: opaque to torch.compile, the same names on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.kernels import reference


@torch.library.custom_op("wina::sparse_linear", mutates_args=())
def _sparse_linear(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    return reference.sparse_linear(x, weight, thresholds, bias)


@_sparse_linear.register_fake
def _(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    del thresholds, bias
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def sparse_linear(
    x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return W (mask o x) + b; see ``reference.sparse_linear``."""
    result: Tensor = torch.ops.wina.sparse_linear(x, weight, thresholds, bias)
    return result
