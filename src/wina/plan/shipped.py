"""Tuned plans that come with wina, for models whose plans are worth having at once.

Each is an ordinary plan's folder below ``shipped/``; which model it is for, its document says.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from wina.files import read_json
from wina.plan.identity import ModelIdentity
from wina.plan.plan import DOCUMENT, Plan, PlanDocument

FOLDER = Path(__file__).parent / "shipped"


@cache
def _documents() -> tuple[tuple[Path, PlanDocument], ...]:
    folders = sorted(path.parent for path in FOLDER.rglob(DOCUMENT))
    return tuple((folder, read_json(folder / DOCUMENT, PlanDocument)) for folder in folders)


def shipped_sparsities(model: ModelIdentity) -> tuple[float, ...]:
    """Return the target sparsities of the plans that come with wina for a model, in order."""
    return tuple(sorted(document.target_sparsity for _, document in _fitting(model)))


def shipped_plan(model: ModelIdentity, sparsity: float) -> Plan:
    """Load the plan for one of ``shipped_sparsities``; raise KeyError if there is none."""
    for folder, document in _fitting(model):
        if document.target_sparsity == sparsity:
            return Plan.load(folder)
    raise KeyError(sparsity)


def _fitting(model: ModelIdentity) -> list[tuple[Path, PlanDocument]]:
    wanted = model.config_hash, model.weights_hash
    return [
        (folder, document)
        for folder, document in _documents()
        if (document.model.config_hash, document.model.weights_hash) == wanted
    ]
