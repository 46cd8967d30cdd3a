"""Which implementation computes the kernels.

The torch operators (see wina.kernels.ops) carry one implementation per device, chosen by torch's
dispatcher from the tensors; where there is none, the reference serves. A backend is the code that
adds such an implementation. A new one is one new file: a function that registers an
implementation of the operators for its device and says whether it could, added to ``BACKENDS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from wina.errors import UsageError
from wina.kernels import cpu
from wina.registry import Registry

ENVIRONMENT = "WINA_BACKEND"
AUTO = "auto"
REFERENCE = "reference"

# name -> load(): register the implementations; returns None, or why they cannot run here.
BACKENDS: Registry[Callable[[], str | None]] = Registry("backend", "backends")
BACKENDS.add(REFERENCE, lambda: None)
BACKENDS.add("cpu", cpu.load)


def _gpu(kind: str) -> str | None:
    from wina.kernels import gpu  # which asks this module what is forced

    return gpu.load_cuda() if kind == "cuda" else gpu.load_triton()


BACKENDS.add("cuda", lambda: _gpu("cuda"))
BACKENDS.add("triton", lambda: _gpu("triton"))

_active = AUTO
_settled = False


@cache
def unavailable(name: str) -> str | None:
    """Load a backend once; return None, or why it cannot run here.

    Raises:
        UsageError: no backend has that name.
    """
    return BACKENDS.get(name)()


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that run on this machine."""
    return tuple(name for name in BACKENDS if unavailable(name) is None)


def active_backend() -> str:
    """Return "auto", or the name that was forced.

    The first call outside ``torch.compile`` loads other packages' backends.
    """
    if not _settled and not torch.compiler.is_compiling():
        settle()
    return _active


def serves(name: str) -> bool:
    """Return whether a backend runs on this machine and no other is forced."""
    return active_backend() in (AUTO, name) and unavailable(name) is None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute the kernels with one backend inside the block; "auto" lets each device choose.

    The choice is the process's, not the thread's. The environment variable WINA_BACKEND sets it
    from the start.

    Raises:
        UsageError: no backend has that name, or it cannot run on this machine.
    """
    global _active
    settle()
    previous, _active = _active, _checked(name)
    try:
        yield
    finally:
        _active = previous


def load_own() -> None:
    """Load wina's own backends, so that the operators have their implementations at import."""
    if os.environ.get(ENVIRONMENT) != REFERENCE:
        for name in BACKENDS.own:
            unavailable(name)


def settle() -> None:
    """Load other packages' backends and heed WINA_BACKEND; done once, at first use.

    Raises:
        UsageError: WINA_BACKEND names no backend, or one that cannot run here.
    """
    global _active, _settled
    if _settled:
        return
    _settled = True
    forced = os.environ.get(ENVIRONMENT) or AUTO
    try:
        _active = _checked(forced)
    except UsageError:
        _settled = False
        raise
    if forced != REFERENCE:
        available_backends()


def _checked(name: str) -> str:
    if name == AUTO:
        return name
    reason = unavailable(name)
    if reason is not None:
        raise UsageError(f"backend {name!r} cannot run here: {reason}")
    return name
