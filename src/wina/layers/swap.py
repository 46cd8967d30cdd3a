"""Apply a plan to a model, and take it away again."""

from __future__ import annotations

from torch import nn

from wina.errors import UsageError, WinaError
from wina.kernels.backends import settle
from wina.layers.experts import close_experts, open_experts, opened
from wina.layers.extras import check_extras, install
from wina.layers.foreign import device_of
from wina.layers.linear import (
    RowsLinear,
    SparseLayer,
    features,
    is_linear,
    make_dense,
    make_sparse,
    set_vectors,
    sparse_layers,
)
from wina.layers.masked import unpack_head
from wina.layers.phase import Phase
from wina.layers.watch import Watch
from wina.plan import Plan, PlanDocument


def find_decoder(model: nn.Module) -> nn.Module:
    """Return the module that every forward pass goes through with ids or embeddings and cache."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return decoder if isinstance(decoder, nn.Module) else model


def check_linears(model: nn.Module, document: PlanDocument) -> dict[str, nn.Module]:
    """Return the planned modules by name; experts must be open.

    Raises:
        UsageError: one has a tensor where the plan's would go.
        WinaError: the model lacks one, or its shape is another.
    """
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, linear in document.linears.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            what = "no such layer" if module is None else f"a {type(module).__qualname__}"
            raise WinaError(
                f"the plan names the linear {name!r}, and the model has {what} there: the plan "
                f"was made for {document.model.name!r}, another model"
            )
        if features(module) != (linear.in_features, linear.out_features):
            raise WinaError(
                f"the plan's {name!r} maps {linear.in_features} to {linear.out_features} features, "
                f"the model's {features(module)[0]} to {features(module)[1]}: the plan was made "
                f"for {document.model.name!r}, another model"
            )
        own = not isinstance(module, SparseLayer) and hasattr(module, "scales")
        if own and document.selection != "threshold":
            raise UsageError(
                f"the {type(module).__qualname__} {name} has scales of its own, and a plan that "
                "keeps the top k would hide them; plan with thresholds"
            )
        found[name] = module
    return found


def sparsify(model: nn.Module, plan: Plan) -> Phase:
    """Make the planned linears of ``model`` sparse, in place, and return their shared phase.

    A model that is sparse already gets the new plan instead of the old one. Nothing is changed
    if the plan does not fit. The model's identity is not checked here (see wina.api).
    """
    document = plan.document
    with opened(model):
        check_linears(model, document)
        check_extras(model, document)
    densify(model)
    open_experts(model, document.linears)
    phase = Phase(document.prefill, document.dense_prefix)
    for name, module in check_linears(model, document).items():
        device = device_of(module)
        vector = plan.vectors[name].to(device, copy=True)
        bias = plan.biases[name].to(device, copy=True) if name in plan.biases else None
        make_sparse(module, vector, document.selection, document.linears[name].keep, phase, bias)
    attach_phase(model, phase)
    install(model, plan, phase)
    phase.check = Watch(list(sparse_layers(model))).look
    return phase


def change_vectors(model: nn.Module, plan: Plan) -> None:
    """Give a sparse model the vectors and biases of another plan for the same linears.

    Nothing else changes, the weights' layout included; the old vectors are not written to, so
    what was compiled or captured with them goes on with them.

    Raises:
        WinaError: the plan names other linears, holds extras, or chooses in another way.
    """
    layers = dict(sparse_layers(model))
    selections = {plan.document.selection, *(layer.selection for layer in layers.values())}
    if layers.keys() != plan.vectors.keys() or selections != {"threshold"} or plan.parts:
        raise WinaError("only the thresholds of the same linears can be changed in place")
    for name, layer in layers.items():
        device = layer.vector.device
        bias = plan.biases[name].to(device) if name in plan.biases else None
        set_vectors(layer, plan.vectors[name].to(device), bias)


def attach_phase(model: nn.Module, phase: Phase) -> None:
    """Let ``phase`` see every call of the model's decoder."""
    settle()  # here, since torch.compile may trace every later use
    decoder = find_decoder(model)
    phase.handle = decoder.register_forward_pre_hook(phase.observe, with_kwargs=True)


def densify(model: nn.Module) -> None:
    """Restore the dense model exactly: the same modules and parameters, no buffer, no hook."""
    for _, layer in list(sparse_layers(model)):
        if layer.phase.handle is not None:
            layer.phase.handle.remove()
        layer.phase.undo()
        make_dense(layer)
    close_experts(model)
    for module in model.modules():
        if type(module) is RowsLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        unpack_head(module)


def phase_of(model: nn.Module) -> Phase | None:
    """Return the phase that a sparse model's layers share; None if the model is dense."""
    layer = next(sparse_layers(model), None)
    return None if layer is None else layer[1].phase
