"""The compiled library: built by setup.py beside this file, bound to the torch that runs.

It registers the operators through torch's stable C interface, whose functions it is handed by
address. So it is built without torch, links neither torch nor Python, and one build serves every
torch from 2.10 on.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wina.errors import UsageError

NAME = "libwina_cpu"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
# WINA_CPU_LIBRARY names another build of it, for instance one with sanitizers.
PATH = Path(os.environ.get("WINA_CPU_LIBRARY") or Path(__file__).with_name(NAME + SUFFIX))
TORCH_LIBRARY = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
    sys.platform, "libtorch_cpu.so"
)
DTYPES = ("float32", "float16", "bfloat16")  # in the order of the library's enum
_FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
_log = logging.getLogger(__name__)


@cache
def load() -> str | None:
    """Register the compiled kernels; return None, or (also logged, once) why they cannot run."""
    reason = _register()
    if reason is not None:
        _log.warning("the compiled CPU kernels cannot run (%s); using the slow reference", reason)
    return reason


def _register() -> str | None:
    if not PATH.exists():
        return f"{PATH.name} was not built: no C++17 compiler at install time"
    try:
        library = _library()
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / TORCH_LIBRARY))
    except OSError as error:
        return str(error)

    def find(name: bytes) -> int | None:
        function = getattr(torch_cpu, name.decode(), None)
        return ctypes.cast(function, ctypes.c_void_p).value if function is not None else None

    reason: bytes | None = library.wina_register(_FIND(find))
    return None if reason is None else f"torch {torch.__version__}: {reason.decode()}"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(PATH))
    library.wina_register.argtypes = [_FIND]
    library.wina_register.restype = ctypes.c_char_p
    library.wina_instruction_set.argtypes = []
    library.wina_instruction_set.restype = ctypes.c_char_p
    library.wina_use_instruction_set.argtypes = [ctypes.c_char_p]
    library.wina_set_crossover.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3]
    library.wina_set_crossover.restype = None
    library.wina_free_blocks.argtypes = [ctypes.c_int64]
    library.wina_free_blocks.restype = None
    library.wina_register_batch_linear.argtypes = []
    library.wina_register_batch_linear.restype = ctypes.c_int
    library.wina_serve_batch.argtypes = [ctypes.c_int]
    library.wina_serve_batch.restype = None
    library.wina_stream.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.wina_stream.restype = ctypes.c_uint32
    return library


class Arena:
    """Memory in huge pages where the system grants them, given out piece by piece.

    A weight of a megabyte lies in no huge page of its own, and rows that are skipped here and
    there cost a miss in the address translation each. Pieces have storages of their own; the pages
    that lie in a piece alone are given back when it is freed.
    """

    def __init__(self, chunk: int = 256 << 20) -> None:
        """Reserve nothing yet; chunks of so many bytes take memory only where it is written."""
        self._chunk = chunk
        self._memory = mmap.mmap(-1, 1)
        self._used = 1

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor that starts at a multiple of 64 bytes."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(*shape, dtype=dtype)
        start, size = -(-self._used // 64) * 64, count * dtype.itemsize
        if start + size > len(self._memory):
            start, length = 0, max(size, self._chunk)
            self._memory = _memory(length)
        self._used = start + size
        piece = memoryview(self._memory)[start : start + size]
        weakref.finalize(piece, _give_back, self._memory, start, size).atexit = False
        return torch.frombuffer(piece, dtype=dtype).view(*shape)


def _memory(length: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, length)
    # Private: systems seldom grant huge pages to memory that could be shared, Python's default.
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap, start: int, size: int) -> None:
    first, end = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
    if hasattr(mmap, "MADV_HUGEPAGE") and first < end:  # private memory, see _memory
        with suppress(OSError):  # a kernel that cannot keeps them until the whole chunk is freed
            memory.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)


def input_major(weight: Tensor, arena: Arena | None = None) -> Tensor:
    """Return a copy of W (out_features, in_features) with strides (1, out_features).

    That is the layout whose dropped channels' memory the kernels skip.

    Args:
        weight: W.
        arena: where a copy on the CPU is put; None gives it memory of its own.
    """
    shape = weight.shape[::-1]
    if weight.device.type == "cpu":
        rows = (arena or Arena(chunk=0)).empty(shape, weight.dtype)
    else:
        rows = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    return rows.copy_(weight.t()).t()


def set_crossover(dtype: torch.dtype, inputs: int, outputs: int, rows: int) -> None:
    """Skip rows of weights of this shape and dtype up to so many rows of x; else compute densely.

    Raises:
        UsageError: the dtype is none of ``DTYPES``.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"the kernels know {', '.join(DTYPES)}, not {name}")
    _library().wina_set_crossover(DTYPES.index(name), inputs, outputs, rows)


def free_blocks(number: int) -> None:
    """Forget the tensors of a row of decoder blocks (wina.kernels.blocks)."""
    _library().wina_free_blocks(number)


def register_batch_linear() -> None:
    """Let the library serve ``wina::batch_linear``, which is defined, while it is told to.

    Otherwise it calls ``wina::divided_linear``, of the same arguments.
    """
    if _library().wina_register_batch_linear():
        raise RuntimeError("torch refused wina::batch_linear")


def serve_batch(serves: bool) -> None:
    """Say whether the library serves the batch that runs next: if all of its rows are sparse."""
    _library().wina_serve_batch(serves)


def stream(data: Tensor) -> None:
    """Read a contiguous tensor's memory once with torch's threads: the bandwidth probe."""
    _library().wina_stream(data.data_ptr(), data.numel() * data.element_size())


def instruction_set() -> str:
    """Return the instruction set that the kernels use: portable, avx2, avx512, avx512_bf16."""
    name: bytes = _library().wina_instruction_set()
    return name.decode()


def use_no_pairs() -> None:
    """Compute bfloat16 without pair products from now on: channels are added one by one.

    Which channels share a pair depends on what other rows keep, and the sum's last bit with it.
    """
    if instruction_set() == "avx512_bf16":
        _library().wina_use_instruction_set(b"avx512")


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Use another of the processor's instruction sets inside the block, for tests and benchmarks.

    Raises:
        UsageError: the processor has none of that name.
    """
    previous = instruction_set()
    if not _library().wina_use_instruction_set(name.encode()):
        raise UsageError(f"instruction set {name!r} is not one of this processor's")
    try:
        yield
    finally:
        _library().wina_use_instruction_set(previous.encode())
