"""What a plan may hold beside thresholds: input bases, low-rank terms, gates on outputs.

A plan without any of it is of schema version 1 and runs everywhere. With any it is of version 2:
the layers compute it with torch around the linears, and what cannot says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from wina.errors import WinaError


class PlannedBasis(BaseModel):
    """One basis: tensors ``NAME.basis`` (features, features) and ``NAME.basis_scale`` (features,).

    Attributes:
        maker: how the rotation was chosen.
        linears: those that run in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    maker: str
    features: int = Field(gt=0)
    linears: list[str] = Field(min_length=1)


class OutputGate(BaseModel):
    """A gate on the output of a gated MLP's gate projection: ``NAME.output_thresholds`` (out,).

    Where |act(g_j)| is below its threshold, g_j is set to zero; since act(0) = 0, row j of ``up``
    and channel j of ``down`` do not matter for that token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    activation: str
    up: str
    down: str


class Extras(BaseModel):
    """All optional parts of a plan.

    Attributes:
        bases: by the leader's name.
        low_ranks: rank of the term that stands in for what a linear drops, y += A B x_dropped:
            ``NAME.low_rank_out`` (out, rank) and ``NAME.low_rank_in`` (rank, in).
        output_gates: by the gate projection's name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bases: dict[str, PlannedBasis] = {}
    low_ranks: dict[str, int] = {}
    output_gates: dict[str, OutputGate] = {}

    def shapes(self, linears: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor; raise WinaError for linears that are not planned."""
        named = [name for basis in self.bases.values() for name in basis.linears]
        named += [*self.low_ranks, *self.output_gates]
        named += [x for gate in self.output_gates.values() for x in (gate.up, gate.down)]
        if unknown := sorted(set(named) - set(linears)):
            raise WinaError(f"the plan's extras name {unknown[0]}, which it does not plan")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, basis in self.bases.items():
            for linear in basis.linears:
                if linears[linear].in_features != basis.features:
                    raise WinaError(f"the plan's basis {name} does not fit {linear}")
            shapes[f"{name}.basis"] = (basis.features, basis.features)
            shapes[f"{name}.basis_scale"] = (basis.features,)
        for name, rank in self.low_ranks.items():
            shapes[f"{name}.low_rank_out"] = (linears[name].out_features, rank)
            shapes[f"{name}.low_rank_in"] = (rank, linears[name].in_features)
        for name in self.output_gates:
            shapes[f"{name}.output_thresholds"] = (linears[name].out_features,)
        return shapes
