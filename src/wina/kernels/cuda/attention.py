"""Attention of one position on a GPU: the launch of attention.cu."""

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


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
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
            )
        ),
        ("scale", ctypes.c_float),
        ("heads", ctypes.c_int),
        ("positions", ctypes.c_int),
    )


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    size, ratio = query.shape[-1], query.shape[1] // key.shape[1]
    width = 16 // query.element_size()
    return (
        query.dtype in ELEMENTS
        and size in SIZES
        and width * 32 >= size
        and value.shape[-1] == size
        and ratio <= MOST
        and ratio * size * 4 * (THREADS // 32) <= SHARED
        and mask.dtype == torch.bool
        and all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (query, key, value))
        and all(step % width == 0 for x in (query, key, value) for step in x.stride()[:-1])
        and mask.stride(-1) == 1
    )


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale q k^T, where mask) v for one position; see the reference."""
    if not _fits(query, key, value, mask):
        return reference.decode_attention(query, key, value, mask, scale)
    batch, heads, _, size = query.shape
    shared, positions = key.shape[1], key.shape[2]
    ratio = heads // shared
    width = 16 // query.element_size()
    slots = THREADS // (size // width)
    cluster = 8
    while cluster > 1 and (batch * shared * cluster > 2 * BLOCKS or slots * cluster > positions):
        cluster //= 2
    macros = {
        "ELEMENT": ELEMENTS[query.dtype],
        "SIZE": size,
        "QUERIES": ratio,
        "CLUSTER": cluster,
        "UNROLL": 4 if ratio <= 4 else 2,
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
    )
    run.launch(batch * shared * cluster, ratio * size * 4 * (THREADS // 32), arguments)
    return out
