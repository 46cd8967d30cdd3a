"""y = W drop(x) of 4- and 8-bit weights on a GPU: how it is cut up, and the launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wina.kernels import reference
from wina.kernels.cuda.compile import kernel, mapping
from wina.kernels.cuda.rows import ACTIVATIONS, ELEMENTS, MOST
from wina.kernels.quantized import QuantizedWeight, dequantize

SEGMENTS = (128, 64, 32)  # channels whose values share a scale
MOST_TOKENS = 8  # more go through the dequantized weight
LANES = (32, 16, 8)
SHARED = 160 << 10  # bytes of a block's shared memory that lists may take


@dataclass(frozen=True)
class Config:
    """How the work is cut up.

    Attributes:
        lanes: threads of a team: 16-byte pieces of a row's tile; 8, 16 or 32.
        teams: of a block; lanes times teams is a multiple of 32.
        unroll: rounds, of two rows for each team, that are under way.
        cluster: blocks that share a tile, each with its part of the channels.
        blocks: of a multiprocessor, for the compiler's choice of registers.
    """

    lanes: int
    teams: int
    unroll: int = 2
    cluster: int = 4
    blocks: int = 2

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.lanes * self.teams


class _Projection(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("sparse_bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("row", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("shift", ctypes.c_int),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("projections", _Projection * MOST),
        ("x", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("pitch", ctypes.c_longlong),
        ("epsilon", ctypes.c_float),
        ("inputs", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("count", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("capacity", ctypes.c_int),
    )


def segment_of(weights: Sequence[QuantizedWeight]) -> int | None:
    """Return the longest segment that divides all groups; None if there is none.

    Where there are several groups, segments are a power of two to a group.
    """

    def suits(weight: QuantizedWeight, segment: int) -> bool:
        per, rest = divmod(weight.group_size, segment)
        return rest == 0 and (len(weight.scales) == 1 or per & (per - 1) == 0)

    return next((n for n in SEGMENTS if all(suits(weight, n) for weight in weights)), None)


def fits(x: Tensor, weights: Sequence[QuantizedWeight]) -> bool:
    """Return whether the kernel can compute W drop(x): one format, few tokens, whole segments.

    It rounds x to 16 bits of each segment's largest value, which float32 is too good for.
    """
    first = weights[0]
    same = all(
        weight.codes.dtype == first.codes.dtype
        and weight.scales.dtype == first.scales.dtype
        and weight.zeros.dtype == first.zeros.dtype
        and bool(weight.zeros.numel()) == bool(first.zeros.numel())
        and weight.group_size == first.group_size
        and weight.shape[0] % 4 == 0
        and weight.codes.numel() > 0
        for weight in weights
    )
    few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    fine = x.dtype in (torch.float16, torch.bfloat16)
    return same and few and fine and segment_of(weights) is not None


def config_for(inputs: int, pieces: Sequence[int], gated: bool, units: int) -> Config:
    """Return how to cut up W drop(x).

    The rule comes from sweeps over Llama-3-8B's launches on an H100 (benchmarks/gpu_quantized.py).
    For each it is within 3 % of the best. The widest tiles that still give every multiprocessor
    a block in clusters of 8 are the best; a second wave of blocks costs half of the time more.

    Args:
        inputs: channels.
        pieces: 16-byte pieces of a row of each projection.
        gated: two projections are computed by one block.
        units: multiprocessors of the device.
    """

    def tiles(lanes: int) -> int:
        return sum(-(-one // lanes) for one in pieces[: 1 if gated else None])

    lanes = next((n for n in LANES if 80 * tiles(n) >= 9 * units), LANES[-1])
    cluster = 1
    while cluster < 8 and 8 * tiles(lanes) * cluster <= 7 * units and inputs >= 256 * cluster:
        cluster *= 2
    found = Config(lanes, 256 // lanes, 3, cluster, 2)
    while found.cluster < 8 and shared_bytes(found, inputs, gated, SEGMENTS[0], 4) > SHARED // 2:
        found = replace(found, cluster=2 * found.cluster)
    return found


def shared_bytes(config: Config, inputs: int, gated: bool, segment: int, bits: int) -> int:
    """Return the dynamic shared memory of a block: lists of live channels, and the warps' sums."""
    capacity = -(-(inputs // segment) // config.cluster)
    count = 2 if gated else 1
    sums = count * config.threads // 32 * config.lanes * (128 // bits) * 4
    return -(-count * capacity * (4 * segment + 12) // 16) * 16 + sums


def macros_of(
    config: Config,
    dtype: torch.dtype,
    weights: Sequence[QuantizedWeight],
    *,
    gated: bool,
    norm: bool,
) -> dict[str, int]:
    """Return what quantized.cu is compiled with for x of a dtype."""
    first = weights[0]
    segment = segment_of(weights)
    assert segment is not None
    return {
        "ELEMENT": ELEMENTS[dtype],
        "SCALE": ELEMENTS[first.scales.dtype],
        "BITS": first.bits,
        "ZEROS": 0 if not first.zeros.numel() else 2 if first.zeros.is_floating_point() else 1,
        "LANES": config.lanes,
        "TEAMS": config.teams,
        "UNROLL": config.unroll,
        "CLUSTER": config.cluster,
        "SEGMENT": segment,
        "ONE": int(len(first.scales) == 1 and not first.zeros.numel()),
        "GATED": int(gated),
        "NORM": int(norm),
        "BLOCKS": config.blocks,
    }


def launch(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    config: Config,
    *,
    activation: str | None = None,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    flags: Tensor | None = None,
    sparse_biases: Sequence[Tensor | None] | None = None,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Return W drop(x) + b of each projection; ``fits`` must hold. See ``rows.rows``.

    Args:
        x: shape (..., inputs), CUDA.
        weights: one to three, of one format.
        thresholds: shape (inputs,), float32, one of each projection.
        biases: shape (outputs,), x's dtype, or None, likewise.
        config: how the work is cut up.
        activation: see ``rows.rows``, as norm, epsilon, residual, flags and out.
        norm: likewise.
        epsilon: likewise.
        residual: likewise.
        flags: likewise.
        sparse_biases: as ``biases``, added to the tokens alone of which channels are dropped.
        out: likewise.
    """
    x = x.contiguous()
    inputs = x.shape[-1]
    tokens = x.numel() // inputs
    segment = segment_of(weights)
    assert segment is not None
    gated = activation is not None
    macros = macros_of(config, x.dtype, weights, gated=gated, norm=norm is not None)
    run = kernel(
        "quantized.cu", "wina_quantized", mapping(macros), x.device.index or 0, config.threads
    )
    capacity = -(-(inputs // segment) // config.cluster)
    residual = None if residual is None else residual.contiguous()
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
        capacity=capacity,
    )
    results, tiles = [], 0
    extras = sparse_biases or [None] * len(weights)
    held = None if out is None else torch.split(out, [weight.shape[0] for weight in weights], -1)
    each = zip(weights, thresholds, biases, extras, strict=True)
    for place, (weight, vector, bias, extra) in enumerate(each):
        projection, outputs = arguments.projections[place], weight.shape[0]
        projection.codes, projection.scales = weight.codes.data_ptr(), weight.scales.data_ptr()
        projection.zeros = weight.zeros.data_ptr() if weight.zeros.numel() else None
        projection.thresholds = vector.data_ptr()
        projection.bias = None if bias is None else bias.data_ptr()
        projection.sparse_bias = None if extra is None else extra.data_ptr()
        projection.row, projection.outputs = weight.codes.shape[1], outputs
        projection.tiles = -(-weight.codes.shape[1] // (16 * config.lanes))
        # One group: all segments are its own.
        per = weight.group_size // segment
        projection.shift = per.bit_length() - 1 if len(weight.scales) > 1 else 31
        if activation is None or place == 0:
            fresh = x.new_empty((*x.shape[:-1], outputs)) if held is None else held[place]
            results.append(fresh)
            projection.out = results[-1].data_ptr()
            tiles += projection.tiles
    shared = shared_bytes(config, inputs, gated, segment, weights[0].bits)
    run.launch(tiles * tokens * config.cluster, shared, arguments)
    return results


def linears(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Return W drop(x) + b of each projection, x normed first, the residual added to the first."""
    if len(weights) <= MOST and fits(x, weights):
        config = _config(x, weights, gated=False)
        return launch(
            x, weights, thresholds, biases, config, norm=norm, epsilon=epsilon, residual=residual
        )
    if len(weights) > 1 and fits(x, weights[:1]):  # of unlike formats, or too many
        first = linears(x, weights[:1], thresholds[:1], biases[:1], norm, epsilon, residual)
        rest = linears(x, weights[1:], thresholds[1:], biases[1:], norm, epsilon)
        return first + rest
    matrices = [dequantize(weight).to(x.dtype) for weight in weights]
    return reference.fused_linears(x, norm, epsilon, matrices, thresholds, biases, residual)


def flagged_linears(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    flags: Tensor,
    sparse_biases: Sequence[Tensor | None],
) -> Tensor | None:
    """Return the projections side by side in one launch; None where the kernel does not fit.

    Args:
        x: shape (rows, inputs).
        weights: of one format, one of each projection.
        thresholds: shape (inputs,), float32, likewise.
        biases: shape (outputs,), x's dtype, or None, likewise.
        flags: False for rows that nothing is dropped of, shape (rows,), bool.
        sparse_biases: as ``biases``, added to the other rows alone.

    Returns:
        Shape (rows, all outputs).
    """
    if len(weights) > MOST or not fits(x, weights):
        return None
    out = x.new_empty(len(x), sum(weight.shape[0] for weight in weights))
    config = _config(x, weights, gated=False)
    rest = (biases, config)
    launch(x, weights, thresholds, *rest, flags=flags, sparse_biases=sparse_biases, out=out)
    return out


def gated_mlp(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    thresholds: Sequence[Tensor],
    activation: str,
    biases: Sequence[Tensor | None],
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the gated MLP of x, normed first, plus the residual; two launches."""
    both = weights[:2]
    if fits(x, both) and both[0].shape == both[1].shape:
        config = _config(x, both, gated=True)
        (hidden,) = launch(
            x,
            both,
            thresholds[:2],
            biases[:2],
            config,
            activation=activation,
            norm=norm,
            epsilon=epsilon,
        )
    else:
        found = linears(x, both, thresholds[:2], biases[:2], norm, epsilon)
        hidden = reference.ACTIVATIONS[activation](found[0]) * found[1]
    return linears(hidden, weights[2:], thresholds[2:], biases[2:], residual=residual)[0]


def _config(x: Tensor, weights: Sequence[QuantizedWeight], *, gated: bool) -> Config:
    units = torch.cuda.get_device_properties(x.device).multi_processor_count
    pieces = [weight.codes.shape[1] // 16 for weight in weights]
    return config_for(x.shape[-1], pieces, gated, units)
