"""Linears whose weights another library keeps: quantized, offloaded, or otherwise not ours to read.

Nothing is known of such a module but that it maps in_features to out_features, so everything here
goes through its own forward. No library is named and none is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wina.errors import UsageError

CHUNK = 512  # rows of the identity that a probe sends through a linear at a time
MAGNITUDES = (1.0, 0.1, 0.01)  # of a probe: static scales of activations may clip or lose some
TOLERANCE = 0.2  # of W x + b, for what rounds activations too
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_foreign(module: nn.Module) -> bool:
    """Return whether a module is a linear that only its own forward can compute.

    That is a module without children that has in_features and out_features, and whose weight is
    not a plain matrix of floats, or whose forward was replaced on the object itself (offloading
    and quantization do that).
    """
    if type(module).__module__.startswith("wina."):
        return False
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not all(isinstance(size, int) for size in shape) or any(module.children()):
        return False
    return "forward" in vars(module) or plain_weight(module) is None


def plain_weight(module: nn.Module) -> Tensor | None:
    """Return a linear's weight, shape (out_features, in_features), if it is a matrix of floats."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS:
        return None
    if type(weight) not in (nn.Parameter, Tensor, DTensor):
        return None  # a tensor that computes in its own way
    return weight if isinstance(weight, DTensor) or weight.shape == shape_of(module) else None


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what computes a linear, without hooks, and without the gate of a masked one."""
    found: Callable[[Tensor], Tensor] = getattr(module, "_own", module.forward)
    return found


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a linear's tensors; the CPU if it holds none here."""
    weight = getattr(module, "weight", None)  # a view where it is an expert's
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    tensor = weight if isinstance(weight, Tensor) else next(own, None)
    if tensor is None or (tensor.is_meta and is_foreign(module)):
        return torch.device("cpu")
    return tensor.device


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """Return W, shape (out_features, in_features), float32 or the weight's own dtype.

    It is the weight itself where that is plain, what the library's own ``weight.dequantize()``
    gives, or else what the module makes of the columns of the identity.

    Raises:
        UsageError: the module's forward raises for each dtype of its input.
    """
    weight = plain_weight(module)
    if weight is not None and not weight.is_meta:
        return weight
    stored = module._parameters.get("weight")
    if stored is not None and type(stored).dequantize is not Tensor.dequantize:
        found = stored.dequantize()
        if isinstance(found, Tensor) and found.shape == shape_of(module):
            return found
    return probed(module)


@torch.no_grad()
def probed(module: nn.Module) -> Tensor:
    """Return W, shape (out_features, in_features), float32, from the forward alone."""
    width = shape_of(module)[1]
    dtype = dtype_of(module)
    zero = torch.zeros(1, width, dtype=dtype, device=device_of(module))
    forward = forward_of(module)
    constant = forward(zero).float()
    columns = []
    for first in range(0, width, CHUNK):
        rows = zero.repeat(min(CHUNK, width - first), 1)
        rows.diagonal(offset=first).fill_(1)
        columns.append(forward(rows).float() - constant)
    return torch.cat(columns).T


@torch.no_grad()
def check_computes(name: str, module: nn.Module, weight: Tensor) -> None:
    """Raise UsageError unless a foreign module computes W x + b, up to the rounding of x.

    Args:
        name: the module's, for the message.
        module: foreign.
        weight: its W, as ``dequantized`` gives it.
    """
    device = device_of(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator).to(device, dtype_of(module))
    forward = forward_of(module)
    zero = forward(torch.zeros_like(x[:1])).float()
    wanted = x.float() @ weight.to(device).float().T
    errors = []
    for magnitude in MAGNITUDES:
        found = (forward(x * magnitude).float() - zero) / magnitude
        errors.append(float((found - wanted).norm() / wanted.norm().clamp(min=1e-30)))
    if not min(errors) < TOLERANCE:
        raise UsageError(
            f"the {type(module).__qualname__} {name} does not compute W x + b: it is "
            f"{min(errors):.0%} off for random inputs. Load the model dequantized."
        )


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let gradients reach the inputs of foreign linears inside the block.

    Those that round activations give none. There the gradient is W^T times that of the output, as
    if nothing had been rounded (straight through).
    """
    wrapped: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        if is_foreign(module) and not _gives_gradients(module):
            before = vars(module).get("forward")
            forward = forward_of(module)
            vars(module)["forward"] = partial(_straight_through, module, forward)
            wrapped.append((module, before))
    try:
        yield
    finally:
        for module, before in wrapped:
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before


def _straight_through(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y: Tensor = _StraightThrough.apply(x, module, forward)  # type: ignore[no-untyped-call]
    return y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, forward: Any) -> Tensor:
        ctx.module, ctx.of = module, forward
        y: Tensor = forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ dequantized(ctx.module).to(gradient), None, None


def _gives_gradients(module: nn.Module) -> bool:
    x = torch.zeros(1, shape_of(module)[1], dtype=dtype_of(module), device=device_of(module))
    x.requires_grad_()
    try:
        with torch.enable_grad():
            y = forward_of(module)(x)
            (found,) = torch.autograd.grad(y, x, torch.ones_like(y), allow_unused=True)
    except Exception:  # libraries fail in their own ways
        return False
    return found is not None and bool((found != 0).any())


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return a dtype of inputs that the module takes."""
    device, width = device_of(module), shape_of(module)[1]
    error: Exception | None = None
    for dtype in dict.fromkeys((*_dtypes(module), torch.float32, torch.bfloat16, torch.float16)):
        try:
            forward_of(module)(torch.zeros(1, width, dtype=dtype, device=device))
        except Exception as caught:  # libraries fail in their own ways
            error = caught
        else:
            return dtype
    raise UsageError(
        f"a {type(module).__qualname__} computes nothing here: {error}. Load the model dequantized."
    ) from error


def _dtypes(module: nn.Module) -> Iterator[torch.dtype]:
    """Yield the dtypes that the module's own floats have, its bias first."""
    tensors = dict(
        chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    )
    ordered = sorted(tensors, key=lambda name: name != "bias")
    yield from (tensors[name].dtype for name in ordered if tensors[name].dtype in FLOATS)
