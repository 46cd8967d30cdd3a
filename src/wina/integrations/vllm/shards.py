"""Which of a plan's linears an engine's layer holds, and which part of their vectors.

Engines fuse projections of one input (q, k and v; gate and up) into one layer. Each keeps its own
thresholds there. Under tensor parallelism a layer's weight is cut along its outputs, which leaves
its thresholds whole, or along its inputs, which cuts them likewise. They were made from norms of
whole columns, so no mask depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from wina.errors import UsageError, WinaError
from wina.plan import PlanDocument, PlannedLinear


def projections_of(
    layer: str, planned: Mapping[str, PlannedLinear], fused: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the names, in a plan, of the projections in a layer; [] if none of them is planned.

    Args:
        layer: its name, such as ``model.layers.0.self_attn.qkv_proj``.
        planned: the plan's linears by the engine's name of them.
        fused: the projections of fused layers by their last name: {"qkv_proj": ["q_proj", ...]}.
    """
    if layer in planned:
        return [layer]
    parent, dot, own = layer.rpartition(".")
    names = [f"{parent}{dot}{name}" for name in fused.get(own, ())]
    return names if any(name in planned for name in names) else []


def check_layer(
    names: Sequence[str], planned: Mapping[str, PlannedLinear], inputs: int, parts: int
) -> None:
    """Raise WinaError unless planned projections fit a layer of so many inputs and parts."""
    if len(names) not in (1, parts):
        raise WinaError(
            f"vLLM's layer of {names[0]} has {parts} parts, and the plan {len(names)} linears there"
        )
    for name in names:
        linear = planned.get(name)
        if linear is not None and linear.in_features != inputs:
            raise WinaError(
                f"the plan's {name!r} has {linear.in_features} inputs, the model's has {inputs}: "
                "the plan was made for another model"
            )


def input_shard(vector: Tensor, held: int, rank: int) -> Tensor:
    """Return a rank's part of a vector over input channels.

    Args:
        vector: shape (in_features,).
        held: input channels that the rank's weight has.
        rank: which of the ranks it is; without meaning where the inputs are not cut.
    """
    start = 0 if held == len(vector) else rank * held
    return vector[start : start + held]


def missing(claimed: set[str], planned: Mapping[str, PlannedLinear]) -> list[str]:
    """Return planned linears that no layer holds, in blocks of which some are held here.

    (Under pipeline parallelism a rank holds some of the blocks only.)
    """
    here = {planned[name].block for name in claimed}
    return sorted(name for name, x in planned.items() if x.block in here and name not in claimed)


def check_servable(document: PlanDocument) -> None:
    """Raise UsageError for a plan that vLLM's layers cannot run."""
    if document.selection != "threshold":
        raise UsageError(
            f"vLLM runs plans with thresholds; this one has selection {document.selection!r}. "
            "Plan with --selection threshold."
        )
    if document.extras is not None:
        raise UsageError(
            "the plan holds bases, low-rank terms or output gates, which run in Transformers alone"
        )
    if heads := [name for name, linear in document.linears.items() if linear.block is None]:
        raise UsageError(
            f"the plan makes {heads[0]} sparse, which stays dense in vLLM; plan without "
            "--include-head"
        )
