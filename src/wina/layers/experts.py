"""Experts of a mixture, which Transformers stores as fused 3-D parameters.

A module of experts that follows Transformers' experts interface (the decorator
``use_experts_implementation``) is *opened*: it gets a submodule for each projection of each
expert, a view of the fused parameters that holds no weight of its own. Those are linears as any
other to the rest of wina: they are found, observed by hooks, planned, and made sparse under their
names, such as ``mlp.experts.5.down_proj``.

The opened module computes through its projections only where one of them drops channels or is
observed. Otherwise the call goes to the implementation that Transformers was told to use, so that
dense prompts and 0 % sparsity cost what they cost before. That is also why the sparse computation
is not an implementation of its own in Transformers' registry: ``generate`` changes the
implementation between prefill and decoding, and would turn the gate off.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from wina.layers.foreign import FLOATS
from wina.layers.linear import SPARSE_CLASSES, SparseLayer
from wina.layers.phase import Phase

INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


class ExpertLinear(nn.Module):
    """One projection of one expert.

    Attributes:
        projection: name of the fused parameter, such as ``gate_up_proj``.
        expert: its index.
        places: rows of the layer's input, flat over batch and positions, that the rows of the
            running call's x are; shape (rows,), int64.
    """

    places: Tensor | None

    def __init__(self, owner: nn.Module, projection: str, expert: int) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it does not become a submodule
        self.projection = projection
        self.expert = expert
        self.places = None

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameters."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """W, shape (out_features, in_features), a view."""
        weight = self.owner._parameters[self.projection]
        assert weight is not None
        view = weight[self.expert]
        return view.t() if self.owner.is_transposed else view

    @property
    def bias(self) -> Tensor | None:
        """The bias, shape (out_features,), a view; or None."""
        if not self.owner.has_bias:
            return None
        return self.owner.get_parameter(f"{self.projection}_bias")[self.expert]

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b for x of shape (rows, in_features)."""
        return functional.linear(x, self.weight, self.bias)

    def register_forward_pre_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        """Register a hook, as any module does, and let the opened experts know of it."""
        self.owner.__dict__["_hooked"] = True
        return super().register_forward_pre_hook(*args, **options)

    def register_forward_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        """Register a hook, as any module does, and let the opened experts know of it."""
        self.owner.__dict__["_hooked"] = True
        return super().register_forward_hook(*args, **options)


class SparseExpertLinear(SparseLayer, ExpertLinear):
    """One projection of one expert, sparse."""

    dense_class = ExpertLinear

    def changed(self) -> None:
        """Let the opened experts see the new vector."""
        self.owner.__dict__["_gates"] = None


SPARSE_CLASSES[ExpertLinear] = SparseExpertLinear


class _Gates:
    """What opened experts know of their sparse projections.

    Attributes:
        phase: which positions are sparse; None if no projection is sparse.
        active: whether any projection drops anything.
        thresholds: of all experts by projection, shape (experts, in_features); None with top-k or
            biases, which are computed expert by expert only.
    """

    def __init__(self, experts: OpenExperts) -> None:
        found = [x for x in experts.projections() if isinstance(x, SparseLayer)]
        self.phase: Phase | None = found[0].phase if found else None
        self.active = any(layer.active for layer in found)
        self.thresholds: dict[str, Tensor] | None = None
        if self.active and all(x.keep is None and x.sparse_bias is None for x in found):
            device = found[0].vector.device
            self.thresholds = {}
            for name in experts.names():
                count = len(experts.get_parameter(name))
                rows = [getattr(getattr(experts, str(index)), name) for index in range(count)]
                zeros = torch.zeros(rows[0].weight.shape[1], device=device)
                vectors = [row.vector if isinstance(row, SparseLayer) else zeros for row in rows]
                self.thresholds[name] = torch.stack(vectors)


class OpenExperts(nn.Module):
    """What opened experts share; the class they were made from follows in the bases."""

    closed_class: ClassVar[type[nn.Module]]
    _gates: _Gates | None
    _hooked: bool  # whether a projection has been hooked since the last look

    def names(self) -> tuple[str, str]:
        """Return the names of the fused parameters: into the expert, and out of it."""
        return projections(self)

    def projections(self) -> Iterator[ExpertLinear]:
        """Yield all projections of all experts."""
        for index in range(len(self.get_parameter("down_proj"))):
            yield from getattr(self, str(index)).children()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, shape (tokens, hidden).

        Args:
            hidden_states: shape (tokens, hidden).
            top_k_index: the experts of each token, shape (tokens, k), int64.
            top_k_weights: their weights, shape (tokens, k).
        """
        gates = self._gates
        if gates is None:
            gates = self._gates = _Gates(self)
        phase = gates.phase
        sparse = gates.active and phase is not None and phase.rows is not False
        compiling = torch.compiler.is_compiling()
        if not sparse and (compiling or not self._observed()):
            dense: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return dense
        # Where nothing may wait for the device: all at once, as long as the copies of the chosen
        # experts' weights are no more than the weights.
        few = top_k_index.numel() <= len(self.get_parameter("down_proj"))
        at_once = compiling or (hidden_states.is_cuda and few and not self._observed())
        if at_once and sparse and gates.thresholds is not None and phase.rows is True:  # type: ignore[union-attr]
            return self._all_at_once(hidden_states, top_k_index, top_k_weights, gates.thresholds)
        return self._one_by_one(hidden_states, top_k_index, top_k_weights, phase)

    def _observed(self) -> bool:
        if self._hooked:  # else hundreds of projections need not be asked at every call
            self._hooked = any(x._forward_pre_hooks or x._forward_hooks for x in self.projections())
        return self._hooked

    def _one_by_one(
        self, hidden: Tensor, index: Tensor, weights: Tensor, phase: Phase | None
    ) -> Tensor:
        tokens, k = index.shape
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self.get_parameter("down_proj"))).tolist()
        rows = True if phase is None else phase.rows
        outputs, first = [], 0
        try:
            for expert, count in enumerate(counts):
                if count == 0:
                    continue
                places = order[first : first + count] // k
                first += count
                if phase is not None and isinstance(rows, Tensor):
                    phase.rows = rows[places % len(rows)]
                x = hidden if tokens == 1 else hidden[places]
                outputs.append(self._through(expert, x, places))
        finally:
            if phase is not None:
                phase.rows = rows
        if tokens == 1:  # in the order of experts, of which each occurs once
            return (torch.cat(outputs) * weights[0, order, None]).sum(0, True).to(hidden.dtype)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        weighted = torch.cat(outputs)[back] * weights.reshape(-1, 1)
        return weighted.view(tokens, k, -1).sum(1).to(hidden.dtype)

    def _through(self, expert: int, x: Tensor, places: Tensor) -> Tensor:
        into, out = getattr(self, str(expert)).children()
        into.places = out.places = places
        return self._after(out(self._between(into(x))))

    def _all_at_once(
        self, hidden: Tensor, index: Tensor, weights: Tensor, thresholds: dict[str, Tensor]
    ) -> Tensor:
        tokens, k = index.shape
        chosen = index.reshape(-1)

        def project(x: Tensor, name: str) -> Tensor:
            weight = self.get_parameter(name)[chosen]
            x = x.masked_fill(x.abs().float() < thresholds[name][chosen], 0)
            y = torch.bmm(x[:, None], weight if self.is_transposed else weight.mT)[:, 0]
            return y + self.get_parameter(f"{name}_bias")[chosen] if self.has_bias else y

        into, out = self.names()
        y = self._after(project(self._between(project(hidden.repeat_interleave(k, 0), into)), out))
        weighted = y * weights.reshape(-1, 1)
        return weighted.view(tokens, k, -1).sum(1).to(hidden.dtype)

    def _between(self, y: Tensor) -> Tensor:
        between: Any = self._apply_gate if self.has_gate else self.act_fn
        found: Tensor = between(y)
        return found

    def _after(self, y: Tensor) -> Tensor:
        # Transformers before 5.20 knows no such norm.
        if not getattr(self, "has_post_expert_norm", False):
            return y
        norm: Any = self.post_expert_norm
        found: Tensor = norm(y)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move everything, the stacked thresholds by making them again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._gates = None
        return self


def projections(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the fused parameters: into the expert, and out of it."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Return whether a module follows Transformers' experts interface, on this process alone.

    Experts whose weights are quantized are none: only their library reads those.
    """
    if not all(hasattr(module, name) for name in INTERFACE):
        return False
    if getattr(module, "_is_expert_parallel", False):
        return False
    parameters = [module._parameters.get(name) for name in projections(module)]
    return all(
        parameter is not None
        and parameter.dim() == 3
        and type(parameter) in (nn.Parameter, Tensor, DTensor)
        and parameter.dtype in FLOATS
        for parameter in parameters
    )


def open_experts(model: nn.Module, names: Collection[str] | None = None) -> list[OpenExperts]:
    """Open the closed experts of a model in place, and return them.

    Args:
        model: the model.
        names: of linears; experts that hold none of them stay closed. None opens all.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if is_experts(module) and not isinstance(module, OpenExperts)
    ]
    if names is not None and found:
        owners = {name.rsplit(".", 2)[0] for name in names}
        found = [(name, module) for name, module in found if name in owners]
    return [_open(module) for _, module in found]


def close_experts(model: nn.Module) -> None:
    """Close all experts of a model: the same classes and no submodules."""
    for module in list(model.modules()):
        if isinstance(module, OpenExperts):
            _close(module)


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Open all experts inside the block; those that were open stay so."""
    found = open_experts(model)
    try:
        yield
    finally:
        for experts in found:
            _close(experts)


def store_input_major(experts: nn.Module) -> None:
    """Store each expert's weights by input channel; one fused parameter is copied at a time."""
    for name in projections(experts):
        parameter = experts.get_parameter(name)
        if experts.is_transposed != (parameter.stride(2) != 1):
            continue
        parameter.data = parameter.data.mT.contiguous().mT


_open_classes: dict[type[nn.Module], type[OpenExperts]] = {}


def _open(module: nn.Module) -> OpenExperts:
    closed = type(module)
    if closed not in _open_classes:
        members: dict[str, Any] = {"closed_class": closed, "__module__": __name__}
        _open_classes[closed] = type(f"Open{closed.__name__}", (OpenExperts, closed), members)
    names = projections(module)
    for expert in range(len(module.get_parameter("down_proj"))):
        parts = nn.Module()
        for name in names:
            parts.add_module(name, ExpertLinear(module, name, expert))
        parts.train(module.training)
        module.add_module(str(expert), parts)
    module.__class__ = _open_classes[closed]
    assert isinstance(module, OpenExperts)
    module._gates, module._hooked = None, False
    return module


def _close(experts: OpenExperts) -> None:
    for expert in range(len(experts.get_parameter("down_proj"))):
        delattr(experts, str(expert))
    del experts._gates, experts._hooked
    for name in experts.names():
        parameter = experts.get_parameter(name)
        if not parameter.is_contiguous():  # see store_input_major
            parameter.data = parameter.data.contiguous()
    experts.__class__ = experts.closed_class  # type: ignore[assignment]
