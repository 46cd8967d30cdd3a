"""A fused, partly sparse linear layer as one opaque torch operator.

``torch.ops.wina.batch_linear`` computes W x + b on the batch's dense rows and W drop(x) + b + s on
its sparse ones. It reads from ``rows.BATCH`` which is which, as vLLM's attention reads its
metadata, so that a compiled or captured model serves any mix. Sparse rows go to the kernels that
serve Transformers models; on a CPU a batch of sparse rows alone goes straight to the compiled
library, any other to ``wina::divided_linear``, which is Python.

In float32 on a CPU, and on request in 16 bits, a row's result has the same bits in any batch. A
channel that lies within rounding of its threshold is kept or dropped by the last bit, and the text
may go another way then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from wina.integrations.vllm.packed import any_products, products_of
from wina.integrations.vllm.rows import BATCH
from wina.kernels import (
    active_backend,
    available_backends,
    dense_linear,
    drop_each,
    sparse_linear,
    sparse_linears,
)
from wina.kernels.cpu import library
from wina.kernels.gpu import flagged_linears
from wina.layers.linear import FEW

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor thresholds, int[] sizes, Tensor[] bias, "
    "Tensor[] sparse_bias) -> Tensor"
)
SKIPPED = 8  # rows up to which rows of W are skipped, where a dense product is at hand
ROWS_A_THREAD = 8  # the least that a dense product gets, where its bits must be the same
_VIEWS = "wina_views"


def batch_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    sizes: list[int],
    bias: Tensor | None,
    sparse_bias: Tensor | None,
) -> Tensor:
    """Return the layer's outputs, shape (rows, outputs).

    Args:
        x: shape (rows, inputs).
        weight: of all projections, one below the other, shape (outputs, inputs).
        thresholds: of each projection, shape (projections, inputs), float32.
        sizes: outputs of each projection.
        bias: shape (outputs,), or None.
        sparse_bias: added on sparse rows only, shape (outputs,), or None.
    """
    biases = [] if bias is None else [bias]
    others = [] if sparse_bias is None else [sparse_bias]
    result: Tensor = torch.ops.wina.batch_linear(x, weight, thresholds, sizes, biases, others)
    return result


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    sizes: list[int],
    bias: list[Tensor],
    sparse_bias: list[Tensor],
) -> Tensor:
    own, extra = bias[0] if bias else None, sparse_bias[0] if sparse_bias else None
    return by_rows(
        x,
        len(weight),
        lambda rows: _dense(rows, weight, own),
        lambda rows: _sparse(rows, weight, thresholds, sizes, _sum(own, extra)),
    )


def by_rows(
    x: Tensor,
    outputs: int,
    dense: Callable[[Tensor], Tensor],
    sparse: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what ``dense`` makes of the batch's dense rows and ``sparse`` of its sparse ones.

    Args:
        x: shape (rows, inputs).
        outputs: of the layer.
        dense: called with some rows of x, or all; returns shape (those rows, outputs).
        sparse: likewise.
    """
    if BATCH.kind == "dense":
        return dense(x)
    if BATCH.kind == "sparse":
        return sparse(x)
    places, others = BATCH.places(len(x), x.device)
    if not len(others):  # not known yet, as when an engine warms up
        return sparse(x)
    result = x.new_empty(len(x), outputs)
    result[others] = dense(x[others])
    result[places] = sparse(x[places])
    return result


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or weight.stride(0) != 1:
        return functional.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return _same_sums(x, weight, bias)
    many = len(x) > FEW and not BATCH.exact
    if many and (products := products_of(weight)) is not None:
        return _join([product(x) for product in products], bias)
    return dense_linear(x, weight, bias)


def _same_sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b in float32, each row with the same bits whatever the number of rows.

    The libraries have other kernels for a few rows a thread, which sum in another order. (In 16
    bits ``dense_linear`` has one kernel for any number, where the crossover says so.)
    """
    count, least = len(x), ROWS_A_THREAD * torch.get_num_threads()
    if count < least:
        x = functional.pad(x, (0, 0, 0, least - count))
    products = products_of(weight)
    if products is None:
        return functional.linear(x, weight, bias)[:count]
    return _join([product(x)[:count] for product in products], bias)


def _sparse(
    x: Tensor, weight: Tensor, thresholds: Tensor, sizes: list[int], bias: Tensor | None
) -> Tensor:
    many = len(x) > SKIPPED and x.dtype != torch.float32 and not BATCH.exact
    if many and (products := products_of(weight)) is not None:
        masked = drop_each(x, thresholds)
        return _join([product(x) for product, x in zip(products, masked, strict=True)], bias)
    if len(sizes) == 1:
        return sparse_linear(x, weight, _views(thresholds, Tensor.unbind)[0], bias)

    def parts(whole: Tensor) -> tuple[Tensor, ...]:
        return torch.split(whole, sizes)

    weights, each = _views(weight, parts), _views(thresholds, Tensor.unbind)
    biases = None if bias is None else _views(bias, parts)
    return torch.cat(sparse_linears(x, weights, each, biases), dim=-1)


def _views(whole: Tensor, make: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return views of a tensor, kept on it: to make them takes as long as a small product."""
    found: tuple[Tensor, ...] | None = getattr(whole, _VIEWS, None)
    if found is None or found[0].data_ptr() != whole.data_ptr():
        found = make(whole.data)  # not of the tensor itself, which would then never be freed
        setattr(whole, _VIEWS, found)
    return found


def _join(parts: list[Tensor], bias: Tensor | None) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return whole if bias is None else whole + bias


def _on_cuda(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    sizes: list[int],
    bias: list[Tensor],
    sparse_bias: list[Tensor],
) -> Tensor:
    own = bias[0] if bias else None
    extra = sparse_bias[0] if sparse_bias else None
    if not torch.cuda.is_current_stream_capturing():
        if BATCH.kind == "dense":
            return _dense(x, weight, own)
        if BATCH.kind == "sparse":
            return _sparse(x, weight, thresholds, sizes, _sum(own, extra))
    # A graph is replayed with any mix of rows: the device looks which are which.
    flags = BATCH.flags(x.device, len(x))
    weights = torch.split(weight, sizes)
    none: list[Tensor | None] = [None] * len(sizes)
    biases = none if own is None else torch.split(own, sizes)
    extras = none if extra is None else torch.split(extra, sizes)
    if x.is_cuda:
        found = flagged_linears(x, weights, thresholds.unbind(), biases, flags, extras)
        if found is not None:
            return found
    added = None if extra is None else flags[:, None] * extra
    masked = gate(x, thresholds, flags)
    if len(x) <= SKIPPED:  # what is 0 by now is skipped, as a dropped channel is
        least = _least(x.shape[-1], x.device)
        parts = [sparse_linear(masked[i], weights[i], least, biases[i]) for i in range(len(sizes))]
    else:
        # Each into its place: to join what is apart would take a third of a small product's time.
        result = x.new_empty(len(x), len(weight))
        parts = list(torch.split(result, sizes, -1))
        for one, part, own_weight, own_bias in zip(masked, parts, weights, biases, strict=True):
            if own_bias is None:
                torch.mm(one, own_weight.t(), out=part)
            else:
                torch.addmm(own_bias, one, own_weight.t(), out=part)
        return result if added is None else result + added
    return _join(parts, added)


def gate(x: Tensor, thresholds: Tensor, flags: Tensor) -> Tensor:
    """Return x as each projection sees it: masked where ``flags`` says so.

    Args:
        x: shape (rows, inputs).
        thresholds: shape (projections, inputs), float32.
        flags: True for sparse rows, shape (rows,).

    Returns:
        Shape (projections, rows, inputs), x's dtype.
    """
    if x.is_cuda:
        from wina.kernels.triton.gate import gate_rows

        return gate_rows(x, thresholds, flags)
    zero_if = flags[:, None] & (x.abs().float() < thresholds[:, None])
    return torch.where(zero_if, 0, x)


@cache
def _least(inputs: int, device: torch.device) -> Tensor:
    return torch.full((inputs,), torch.finfo(torch.float32).tiny, device=device)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _fake(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    sizes: list[int],
    bias: list[Tensor],
    sparse_bias: list[Tensor],
) -> Tensor:
    del thresholds, sizes, bias, sparse_bias
    return x.new_empty(x.shape[0], weight.shape[0])


def _started() -> None:
    copied = BATCH.used > SKIPPED and any_products()
    forced = active_backend() == "reference"
    library.serve_batch(BATCH.kind == "sparse" and not copied and not forced)


def _define() -> None:
    for name in ("wina::batch_linear", "wina::divided_linear"):
        torch.library.define(name, SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, _fake)
    torch.library.impl("wina::divided_linear", "CPU", _on_cpu)
    torch.library.impl("wina::batch_linear", "CUDA", _on_cuda)
    if "cpu" in available_backends():
        library.register_batch_linear()
        BATCH.started = _started
    else:
        torch.library.impl("wina::batch_linear", "CPU", _on_cpu)


_define()
