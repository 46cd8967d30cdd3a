"""drop(x) on a GPU under several vectors at once, for a dense product to follow."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from wina.kernels import reference
from wina.kernels.cuda.compile import kernel
from wina.kernels.cuda.rows import ELEMENTS, MOST

THREADS = 256


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p * MOST),
        ("out", ctypes.c_void_p * MOST),
        ("size", ctypes.c_longlong),
        ("inputs", ctypes.c_int),
        ("count", ctypes.c_int),
    )


def gate(x: Tensor, thresholds: Sequence[Tensor]) -> list[Tensor]:
    """Return drop(x) under each vector; x of any shape (..., inputs), CUDA."""
    x = x.contiguous()
    inputs, size = x.shape[-1], x.element_size()
    if x.dtype not in ELEMENTS or inputs * size % 16 or len(thresholds) > MOST or not x.numel():
        return [reference.drop(x, vector) for vector in thresholds]
    results = [x.new_empty(x.shape) for _ in thresholds]
    arguments = _Arguments(x=x.data_ptr(), size=x.numel(), inputs=inputs, count=len(thresholds))
    for place, (vector, out) in enumerate(zip(thresholds, results, strict=True)):
        arguments.thresholds[place], arguments.out[place] = vector.data_ptr(), out.data_ptr()
    run = kernel(
        "gate.cu", "wina_gate", (("ELEMENT", ELEMENTS[x.dtype]),), x.device.index or 0, THREADS
    )
    run.launch(-(-x.numel() * size // 16 // THREADS), 0, arguments)
    return results
