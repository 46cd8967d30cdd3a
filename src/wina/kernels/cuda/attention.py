"""Attention of one position on a GPU: the launches of attention.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from wina.kernels import reference
from wina.kernels.cuda.compile import kernel, mapping
from wina.kernels.cuda.rows import ELEMENTS

THREADS = 256
SIZES = (32, 64, 128, 256)  # of a head: powers of two
MOST = 8  # query heads to a key head
SHARED = 64 << 10
BLOCKS = 160  # about one a multiprocessor
CLUSTERS = (16, 8, 4, 2)  # the first needs a device that takes more than CUDA promises
UNROLL = 2  # positions that a thread has under way


class _Arguments(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query",
                "key",
                "value",
                "mask",
                "out",
                "new_key",
                "new_value",
                "cos",
                "sin",
                "length",
            )
        ),
        *(
            (name, ctypes.c_longlong)
            for name in (
                "query_batch",
                "query_head",
                "key_batch",
                "key_head",
                "key_position",
                "value_batch",
                "value_head",
                "value_position",
                "mask_batch",
                "new_key_batch",
                "new_key_head",
                "new_value_batch",
                "new_value_head",
                "turn_batch",
            )
        ),
        ("scale", ctypes.c_float),
        ("heads", ctypes.c_int),
        ("positions", ctypes.c_int),
    )


def attends(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rotary: int = 0) -> bool:
    """Return whether the kernel serves tensors of such shapes and dtypes; fake ones serve too.

    Args:
        query: shape (batch, heads, 1, size).
        key: shape (batch, key heads, positions, size).
        value: shape (batch, key heads, positions, value size).
        mask: shape (batch or 1, 1, 1, positions).
        rotary: how many of a head's numbers are rotated.
    """
    size, ratio = query.shape[-1], query.shape[1] // key.shape[1]
    width = 16 // query.element_size()
    return (
        query.dtype in ELEMENTS
        and query.dtype == key.dtype == value.dtype
        and size in SIZES
        and width * 32 >= size
        and value.shape[-1] == size
        and ratio <= MOST
        and ratio * size * 4 * (THREADS // 32) <= SHARED
        and mask.dtype == torch.bool
        and rotary % (2 * width) == 0
        and rotary <= size
    )


def _lies_well(mask: Tensor, *tensors: Tensor) -> bool:
    """Return whether vectors of 16 bytes can be read from tensors."""
    return mask.stride(-1) == 1 and all(
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        for x in tensors
    )


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale q k^T, where mask) v for one position; see the reference."""
    if not (attends(query, key, value, mask) and _lies_well(mask, query, key, value)):
        return reference.decode_attention(query, key, value, mask, scale)
    return _launch(query, key, value, mask, scale)


def attention_step(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    length: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """Rotate, write to the cache and attend in one launch; see the reference."""
    arguments = (query, new_key, new_value, cos, sin, key, value, length, mask, scale)
    rotary = cos.shape[-1]
    tensors = (query, new_key, new_value, key, value, cos, sin)
    same = all(x.dtype == query.dtype for x in tensors) and cos.stride() == sin.stride()
    if not (
        same
        and attends(query, key, value, mask, rotary)
        and _lies_well(mask, *tensors)
        and length.dtype == torch.int64
    ):
        return reference.attention_step(*arguments)
    return _launch(
        query,
        key,
        value,
        mask,
        scale,
        rotary,
        new_key=new_key.data_ptr(),
        new_value=new_value.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        length=length.data_ptr(),
        new_key_batch=new_key.stride(0),
        new_key_head=new_key.stride(1),
        new_value_batch=new_value.stride(0),
        new_value_head=new_value.stride(1),
        turn_batch=cos.stride(0) if cos.shape[0] > 1 else 0,
    )


def cluster_of(rows: int, positions: int, slots: int) -> int:
    """Return how many blocks share a key head's positions.

    Args:
        rows: key heads of all texts.
        positions: of the cache.
        slots: positions that a block looks at side by side.
    """
    for cluster in CLUSTERS:
        most = BLOCKS if cluster > 8 else 2 * BLOCKS
        if rows * cluster <= most and slots * cluster <= positions:
            return cluster
    return 1


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    rotary: int = 0,
    **step: int,
) -> Tensor:
    batch, heads, _, size = query.shape
    shared, positions = key.shape[1], key.shape[2]
    ratio = heads // shared
    slots = THREADS // (size * query.element_size() // 16)
    cluster = cluster_of(batch * shared, positions, slots)
    macros = {
        "ELEMENT": ELEMENTS[query.dtype],
        "SIZE": size,
        "QUERIES": ratio,
        "CLUSTER": cluster,
        "UNROLL": UNROLL,
        "ROTARY": rotary,
    }
    device = query.device.index or 0
    run = kernel("attention.cu", "wina_attention", mapping(macros), device, THREADS)
    out = query.new_empty((batch, heads, 1, size))
    arguments = _Arguments(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        mask=mask.data_ptr(),
        out=out.data_ptr(),
        query_batch=query.stride(0),
        query_head=query.stride(1),
        key_batch=key.stride(0),
        key_head=key.stride(1),
        key_position=key.stride(2),
        value_batch=value.stride(0),
        value_head=value.stride(1),
        value_position=value.stride(2),
        mask_batch=mask.stride(0) if mask.shape[0] > 1 else 0,
        scale=scale,
        heads=shared,
        positions=positions,
        **step,
    )
    run.launch(batch * shared * cluster, ratio * size * 4 * (THREADS // 32), arguments)
    return out
