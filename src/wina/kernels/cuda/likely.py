"""The most likely token on a GPU: the launch of likely.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from wina.kernels import reference
from wina.kernels.cuda.compile import kernel, mapping
from wina.kernels.cuda.rows import ELEMENTS

THREADS = 512
CLUSTER = 16


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int),
    )


def most_likely(logits: Tensor) -> Tensor:
    """Return ``logits.argmax(-1)``, the first of equals, of logits of shape (batch, vocabulary)."""
    rows, vocabulary = logits.shape
    whole = vocabulary * logits.element_size() % 16 == 0 and logits.data_ptr() % 16 == 0
    if logits.dtype not in ELEMENTS or not whole or not logits.is_contiguous() or not rows:
        return reference.most_likely(logits)
    macros = {"ELEMENT": ELEMENTS[logits.dtype], "CLUSTER": CLUSTER}
    run = kernel("likely.cu", "wina_likely", mapping(macros), logits.device.index or 0, THREADS)
    out = logits.new_empty(rows, dtype=torch.int64)
    arguments = _Arguments(logits=logits.data_ptr(), out=out.data_ptr(), vocabulary=vocabulary)
    run.launch(rows * CLUSTER, 0, arguments)
    return out
