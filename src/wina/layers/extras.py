"""Run what a plan holds beside thresholds, as hooks around the linears; all of it can be undone.

Hooks compose with everything else that looks at a linear: whatever is registered later sees the
rotated input and the stored weight, so that statistics, searches and counts need know nothing of
bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from wina.bases import Basis
from wina.errors import UsageError, WinaError
from wina.kernels.reference import ACTIVATIONS
from wina.layers.linear import SparseLayer, align, is_read_by_others, matrix
from wina.layers.phase import Phase
from wina.plan import Plan, PlanDocument

Undo = Callable[[], None]


def change_basis(model: nn.Module, groups: Mapping[str, tuple[Sequence[str], Basis]]) -> Undo:
    """Run groups of linears in a basis, in place; return what restores them exactly.

    The original weights are kept beside the rotated ones.

    Args:
        model: dense or sparse.
        groups: by any name, the qualified names of the linears and their basis.

    Raises:
        UsageError: another library keeps a linear's weight; nothing is changed then.
    """
    check_readable(model, [name for names, _ in groups.values() for name in names])
    undo: list[Undo] = []
    for names, basis in groups.values():
        layers = [model.get_submodule(name) for name in names]
        weight = layers[0].get_parameter("weight")
        device = weight.device
        moved = Basis(basis.matrix.to(device), basis.scale.to(device))
        rotate = _rotation(moved.input_matrix(weight.dtype))
        for layer in layers:
            parameter = layer.get_parameter("weight")
            undo.append(_restoring(parameter))
            rotated = moved.rotate_weight(matrix(layer).detach())
            parameter.data = rotated.t().contiguous() if isinstance(layer, Conv1D) else rotated
            if bool((rotated == 0).all(0).any()):
                layer.has_zero_columns = True  # type: ignore[assignment]
                undo.append(lambda layer=layer: delattr(layer, "has_zero_columns"))  # type: ignore[misc]
            undo.append(layer.register_forward_pre_hook(rotate).remove)
    return lambda: _undo(undo)


def check_extras(model: nn.Module, document: PlanDocument) -> None:
    """Raise UsageError if another library keeps the weight of a linear that extras are for."""
    extras = document.extras
    if extras is not None:
        rotated = [name for basis in extras.bases.values() for name in basis.linears]
        check_readable(model, [*rotated, *extras.low_ranks, *extras.output_gates])


def check_readable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UsageError if another library keeps the weight of one of these linears."""
    for name in names:
        module = model.get_submodule(name)
        if is_read_by_others(module):
            raise UsageError(
                f"only the library that keeps {name} ({type(module).__qualname__}) reads its "
                "weight: thresholds run in front of it, but no input basis, low-rank term or "
                "output gate. Load the model dequantized for those."
            )


def _restoring(parameter: nn.Parameter) -> Undo:
    original = parameter.data

    def restore() -> None:
        parameter.data = original.to(parameter.device)

    return restore


def _rotation(input_matrix: Tensor) -> Callable[..., tuple[Tensor]]:
    """Return the pre-hook of a group: rotates x once although each linear asks for it."""
    last: list[Any] = [None, -1, None]  # the input, its version, the rotated input

    def rotate(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0]
        if torch.compiler.is_compiling():  # the compiler sees that the products are the same
            return (x @ input_matrix,)
        if last[0] is not x or last[1] != x._version:
            last[:] = x, x._version, x @ input_matrix
        return (last[2],)

    return rotate


def install(model: nn.Module, plan: Plan, phase: Phase) -> None:
    """Install a plan's extras on a model that it has just made sparse; ``phase`` undoes them.

    Raises:
        WinaError: an unknown activation; the model is left as the plan's vectors made it.
    """
    extras = plan.document.extras
    if extras is None:
        return
    for name, gate in extras.output_gates.items():
        if gate.activation not in ACTIVATIONS:
            raise WinaError(f"unknown activation {gate.activation!r} of the output gate of {name}")
    groups = {
        name: (
            basis.linears,
            Basis(plan.parts[f"{name}.basis"], plan.parts[f"{name}.basis_scale"]),
        )
        for name, basis in extras.bases.items()
    }
    undo = [change_basis(model, groups)]
    for name in extras.low_ranks:
        layer = model.get_submodule(name)
        like = layer.get_parameter("weight")
        factors = [plan.parts[f"{name}.low_rank_{side}"].to(like) for side in ("in", "out")]
        undo.append(layer.register_forward_hook(_low_rank(*factors)).remove)
    for name, gate in extras.output_gates.items():
        layer, up = model.get_submodule(name), model.get_submodule(gate.up)
        device = layer.get_parameter("weight").device
        thresholds = plan.parts[f"{name}.output_thresholds"].to(device)
        hook = _output_gate(thresholds, ACTIVATIONS[gate.activation])
        undo.append(layer.register_forward_hook(hook).remove)
        down = model.get_submodule(gate.down)
        down.skips = (gate.up, matrix(up).shape[1])  # type: ignore[assignment]
        undo.append(lambda down=down: delattr(down, "skips"))  # type: ignore[misc]
    phase.undo = lambda: _undo(undo)


def _undo(steps: list[Undo]) -> None:
    while steps:
        steps.pop()()


def _low_rank(into: Tensor, out: Tensor) -> Callable[..., Tensor]:
    """Add A B (x - what the gate leaves of x) to y on sparse positions."""

    def add(layer: SparseLayer, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        rows = layer.phase.rows
        if rows is False or not layer.active:
            return y
        x = args[0]
        dropped = ~layer.mask(x)
        if isinstance(rows, Tensor):
            dropped = dropped & align(rows, x)
        rest = torch.where(dropped, x, 0)
        return y + functional.linear(functional.linear(rest, into), out)

    return add


def _output_gate(
    thresholds: Tensor, activation: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    def gate(layer: SparseLayer, _args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        rows = layer.phase.rows
        if rows is False:
            return y
        dropped = activation(y).abs().float() < thresholds
        if isinstance(rows, Tensor):
            dropped = dropped & align(rows, y)
        return torch.where(dropped, 0, y)

    return gate
