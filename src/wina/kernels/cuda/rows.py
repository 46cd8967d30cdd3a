"""y = W drop(x) on a GPU by skipping rows: shapes, configurations and the launch of rows.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wina.kernels.cuda.compile import kernel, mapping
from wina.kernels.shapes import tiles_of
from wina.kernels.tickets import tickets

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
TOKENS = (1, 2, 4, 8)  # rows of x that a kernel is compiled for
MOST = 3  # projections of one launch
HELD = 4  # 16 bytes of x that a thread gates at once
SLOTS = 2  # the kind of loads that needs shared memory


@dataclass(frozen=True)
class Config:
    """How the work is cut up.

    Attributes:
        lanes: threads that read one row's tile, 16 bytes each.
        groups: rows that a block reads side by side.
        unroll: rows that a thread has under way.
        cluster: blocks that share a tile, each with its part of the channels: 1, 2, 4 or 8; with
            ``far`` any number.
        blocks: of a multiprocessor, for the compiler's choice of registers. Two leave room for
            the next kernel, which can then start before this one has ended.
        loads: how rows are kept under way: 0 at once, 1 a register as soon as it was used, 2 as 1
            through shared memory.
        prefetch: bytes around a load that go to the second-level cache: 0, 128 or 256.
        whole: 1 if each block of a cluster gates all channels and takes an equal share of the
            live ones; 0 if it gates its share of the channels, which leaves some with more rows
            to read. Needs one row of x, and threads enough (``gates_whole``).
        ahead: threads whose live channels' rows are asked for before they are listed.
        far: 1 if the blocks that share a tile are no cluster: their sums meet in the second-level
            cache, which takes longer, but no multiprocessor is left out for want of a neighbour.
    """

    lanes: int
    groups: int
    unroll: int = 8
    cluster: int = 1
    blocks: int = 2
    loads: int = 1
    prefetch: int = 0
    whole: int = 0
    ahead: int = 0
    far: int = 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return -(-self.lanes * self.groups // 32) * 32


class _Projection(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_longlong),
        ("outputs", ctypes.c_int),
        ("tiles", ctypes.c_int),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("projections", _Projection * MOST),
        ("x", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("tickets", ctypes.c_void_p),
        ("pitch", ctypes.c_longlong),
        ("epsilon", ctypes.c_float),
        ("inputs", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("count", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("slots", ctypes.c_int),
    )


def fits(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    norm: Tensor | None = None,
) -> bool:
    """Return whether the kernel can compute W drop(x): few tokens, input-major rows of 16 bytes."""
    vectors = thresholds if norm is None else (*thresholds, norm)
    if any(vector.data_ptr() % 16 or not vector.is_contiguous() for vector in vectors):
        return False
    if x.data_ptr() % 16 and x.is_contiguous():
        return False
    if x.dtype not in ELEMENTS or not x.numel() or x.numel() > TOKENS[-1] * x.shape[-1]:
        return False
    width = 16 // x.element_size()
    return x.shape[-1] % width == 0 and all(
        weight.dtype == x.dtype
        and weight.stride(0) == 1
        and weight.stride(1) % width == 0
        and weight.shape[0] % width == 0
        and weight.stride(1) * x.element_size() < 1 << 31
        and weight.data_ptr() % 16 == 0
        and weight.numel() > 0
        for weight in weights
    )


def list_bytes(inputs: int, cluster: int, gated: bool, tokens: int, size: int) -> int:
    """Return the bytes that a block's lists of live channels may need."""
    width = 16 // size
    capacity = -(-(inputs // width) // cluster) * width
    return (2 if gated else 1) * capacity * (4 + size * tokens)


def shared_bytes(config: Config, inputs: int, gated: bool, tokens: int, size: int) -> int:
    """Return the dynamic shared memory of a block: lists, slots; later the groups' sums."""
    lists = list_bytes(inputs, config.cluster, gated, tokens, size)
    slots = 16 * config.threads * config.unroll if config.loads == SLOTS else 0
    return max(lists + slots, 16 // size * config.groups * config.lanes * 4)


def gates_whole(config: Config, inputs: int, tokens: int, size: int) -> bool:
    """Return whether the threads of one block can gate all channels at once."""
    return tokens == 1 and inputs * size <= 16 * HELD * config.threads


def macros_of(
    config: Config, dtype: torch.dtype, inputs: int, tokens: int, *, gated: bool, norm: bool
) -> dict[str, int]:
    """Return what rows.cu is compiled with for x of a shape; tokens: one of ``TOKENS``."""
    chunks = -(-(inputs * dtype.itemsize // 16) // (1 if config.whole else config.cluster))
    return {
        "ELEMENT": ELEMENTS[dtype],
        "TOKENS": tokens,
        "LANES": config.lanes,
        "GROUPS": config.groups,
        "UNROLL": config.unroll,
        "LOADS": config.loads,
        "PREFETCH": config.prefetch,
        "SPLIT": config.cluster,
        "CLUSTER": 1 if config.far else config.cluster,
        "WHOLE": config.whole,
        "HELD": min(HELD if tokens == 1 else 1, -(-chunks // config.threads)),
        "GATED": int(gated),
        "NORM": int(norm),
        "BLOCKS": config.blocks,
        "AHEAD": config.ahead,
    }


def rows(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    config: Config,
    *,
    activation: str | None = None,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    flags: Tensor | None = None,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Return W drop(x) + b of each projection; ``fits`` must hold.

    Args:
        x: shape (..., inputs), CUDA.
        weights: W, shape (outputs, inputs), strides (1, outputs): one to three.
        thresholds: shape (inputs,), float32, one of each projection.
        biases: shape (outputs,) or None, one of each projection.
        config: how the work is cut up.
        activation: with it there are two projections, gate and up, and one result, act(gate) * up.
        norm: the weight of an RMSNorm that x goes through first, shape (inputs,).
        epsilon: of the norm.
        residual: added to the first projection's result, that result's shape.
        flags: False for tokens whose channels are all kept, shape (tokens,), bool.
        out: holds the results then, side by side, shape (..., all outputs).
    """
    x = x.contiguous()
    inputs, size = x.shape[-1], x.element_size()
    width, gated = 16 // size, activation is not None
    tokens = x.numel() // inputs
    compiled_for = next(number for number in TOKENS if number >= tokens)
    if config.whole and not gates_whole(config, inputs, compiled_for, size):
        config = replace(config, whole=0)
    macros = macros_of(config, x.dtype, inputs, compiled_for, gated=gated, norm=norm is not None)
    device = x.device.index or 0
    run = kernel("rows.cu", "wina_rows", mapping(macros), device, config.threads)
    columns = config.lanes * width
    residual = None if residual is None else residual.contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    lists = list_bytes(inputs, config.cluster, gated, compiled_for, size)
    arguments = _Arguments(
        x=x.data_ptr(),
        norm=None if norm is None else norm.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        flags=None if flags is None else flags.data_ptr(),
        pitch=0 if out is None else out.shape[-1],
        epsilon=epsilon,
        inputs=inputs,
        tokens=tokens,
        count=len(weights),
        activation=ACTIVATIONS[activation or "silu"],
        capacity=-(-(inputs // width) // config.cluster) * width,
        slots=lists,
    )
    results: list[Tensor] = []
    widths = [weight.shape[0] for weight in weights]
    held = None if out is None else torch.split(out, widths, -1)
    each = tiles_of(widths, columns)
    tiles = each[0] if gated else sum(each)
    for place, (weight, vector, bias) in enumerate(zip(weights, thresholds, biases, strict=True)):
        projection = arguments.projections[place]
        projection.weight, projection.thresholds = weight.data_ptr(), vector.data_ptr()
        projection.bias = None if bias is None else bias.data_ptr()
        projection.stride, projection.outputs = weight.stride(1), weight.shape[0]
        projection.tiles = each[place]
        if activation is None or place == 0:
            fresh = x.new_empty((*x.shape[:-1], weight.shape[0])) if held is None else held[place]
            results.append(fresh)
            projection.out = results[-1].data_ptr()
    if config.far:
        lists_of_sums = (2 if gated else 1) * compiled_for * config.cluster * columns
        sums = torch.empty(tiles * lists_of_sums, dtype=torch.float32, device=x.device)
        arguments.sums = sums.data_ptr()
        arguments.tickets = tickets(x.device, weights[0].data_ptr(), tiles).data_ptr()
    shared = shared_bytes(config, inputs, gated, compiled_for, size)
    run.launch(tiles * config.cluster, shared, arguments)
    return results
