"""The plan: what to drop in which linear. A sidecar folder beside an untouched base model."""

from wina.plan.extras import Extras, OutputGate, PlannedBasis
from wina.plan.identity import ModelIdentity
from wina.plan.plan import SCHEMA_VERSION, Plan, PlanDocument, PlannedLinear
from wina.plan.shipped import shipped_plan, shipped_sparsities

__all__ = [
    "SCHEMA_VERSION",
    "Extras",
    "ModelIdentity",
    "OutputGate",
    "Plan",
    "PlanDocument",
    "PlannedBasis",
    "PlannedLinear",
    "shipped_plan",
    "shipped_sparsities",
]
