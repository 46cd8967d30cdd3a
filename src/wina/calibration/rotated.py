"""Calibrate and plan in input bases: everything sees the rotated inputs and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina.bases import Basis, BasisMaker, GroupFacts, bases
from wina.calibration.artifact import Calibration
from wina.calibration.collect import (
    Sums,
    add_gradients,
    add_scores,
    collectable,
    column_norms,
    gradient_checkpointed,
    gradient_rms,
    to_statistics,
)
from wina.criteria import LinearFacts
from wina.errors import UsageError
from wina.layers.extras import change_basis
from wina.layers.linear import matrix
from wina.models import InputGroup, input_groups, norm_scale, run_body
from wina.plan import Extras, Plan, PlannedBasis
from wina.progress import track

STATISTICS_TOKENS = 16_384  # calibration tokens that statistics in a basis read


@dataclass(frozen=True)
class ModelBases:
    """The bases of a model's groups.

    Attributes:
        maker: how they were chosen.
        groups: the linears, in order.
        found: the basis of each group.
    """

    maker: str
    groups: list[InputGroup]
    found: list[Basis]


@torch.no_grad()
def find_bases(
    model: PreTrainedModel, maker: str, calibration: Calibration | None = None
) -> ModelBases:
    """Choose a basis for each group of linears that shares an input with k or gate.

    Args:
        model: dense.
        maker: name of a registered way to choose a basis.
        calibration: of the model; its text gives the inputs' covariance where that is needed.

    Raises:
        UsageError: an unknown name, a model without such groups, or no calibration to read.
    """
    make = bases.get(maker)
    groups = input_groups(model)
    if not groups:
        raise UsageError(
            f"{type(model).__name__} has no k_proj, gate_proj or linear that fuses them: "
            f"basis {maker!r} has nothing to rotate"
        )
    scales = [norm_scale(model, group) for group in groups]
    covariances: Sequence[Tensor | None] = [None] * len(groups)
    if make.needs_covariance and calibration is None:
        raise UsageError(f"basis {maker!r} needs a calibration, for its text")
    if make.needs_covariance and calibration is not None:
        covariances = _covariances(model, groups, scales, calibration)
    found = []
    zipped = zip(groups, scales, covariances, strict=True)
    for group, scale, covariance in track(zipped, f"basis {maker}", len(groups)):
        found.append(_basis(make, model, group, scale, covariance))
    return ModelBases(maker, groups, found)


def _basis(
    make: BasisMaker, model: nn.Module, group: InputGroup, scale: Tensor, covariance: Tensor | None
) -> Basis:
    weight = matrix(model.get_submodule(group.leader)).detach().double() * scale.double()
    return Basis(make.matrix(GroupFacts(weight, covariance)).float(), scale)


def _covariances(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    scales: Sequence[Tensor],
    calibration: Calibration,
) -> list[Tensor]:
    """Return E[z z^T] of the inputs z = x / d, shape (features, features), float64 each."""
    skip = calibration.document.dense_prefix
    windows = calibration.windows(limit=_window_limit(calibration))
    device = model.device
    sums = [torch.zeros(g.features, g.features, dtype=torch.float64, device=device) for g in groups]

    def hook(index: int) -> Any:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0].reshape(-1, groups[index].features)[skip:].float() / scales[index]
            sums[index] += (z.t() @ z).double()

        return add

    handles = [
        model.get_submodule(group.leader).register_forward_pre_hook(hook(index))
        for index, group in enumerate(groups)
    ]
    try:
        for ids in track(windows, "covariance", len(windows)):
            run_body(model, ids.to(device))
    finally:
        for handle in handles:
            handle.remove()
    count = sum(ids.shape[1] - skip for ids in windows)
    return [total / count for total in sums]


@contextmanager
def in_bases(model: nn.Module, found: ModelBases) -> Iterator[None]:
    """Run a dense model's groups in their bases inside the block: the same function."""
    groups = {
        group.leader: (group.linears, basis)
        for group, basis in zip(found.groups, found.found, strict=True)
    }
    undo = change_basis(model, groups)
    try:
        yield
    finally:
        undo()


def recollect(
    model: PreTrainedModel, calibration: Calibration, gradient: bool = False
) -> Calibration:
    """Return a calibration with the statistics of the model as it is now, such as in bases.

    Args:
        model: dense.
        calibration: whose text is read, up to STATISTICS_TOKENS of it.
        gradient: collect gradients too.
    """
    sites = [linear.site for linear in calibration.statistics]
    windows = calibration.windows(limit=_window_limit(calibration))
    skip = calibration.document.dense_prefix
    norms = column_norms(model, sites)
    sums: Sums = {}
    if gradient:
        with gradient_checkpointed(model):
            for ids in track(windows, "gradients", len(windows)):
                add_gradients(model, sites, ids.to(model.device), skip, sums)
    gradients = gradient_rms(sites, sums)
    facts = {
        site.name: LinearFacts(site.kind, norms[site.name], gradients[site.name]) for site in sites
    }
    scales: Mapping[str, Mapping[str, Tensor]] = {
        criterion.name: {name: criterion.scale(fact) for name, fact in facts.items()}
        for criterion in collectable(gradient)
    }
    for ids in track(windows, "scores", len(windows)):
        add_scores(model, sites, scales, ids.to(model.device), skip, sums)
    document = calibration.document.model_copy(update={"verdict": None})
    return replace(calibration, document=document, statistics=to_statistics(sites, norms, sums))


def _window_limit(calibration: Calibration) -> int:
    return max(1, STATISTICS_TOKENS // calibration.document.window)


def with_bases(plan: Plan, found: ModelBases) -> Plan:
    """Return a plan made in bases with the bases in it, for the model as it was."""
    planned, parts = {}, dict(plan.parts)
    for group, basis in zip(found.groups, found.found, strict=True):
        linears = [name for name in group.linears if name in plan.vectors]
        planned[group.leader] = PlannedBasis(
            maker=found.maker, features=group.features, linears=linears
        )
        parts[f"{group.leader}.basis"] = basis.matrix.cpu()
        parts[f"{group.leader}.basis_scale"] = basis.scale.cpu()
    extras = plan.document.extras or Extras()
    document = plan.document.model_copy(
        update={"schema_version": 2, "extras": extras.model_copy(update={"bases": planned})}
    )
    return replace(plan, document=document, parts=parts)
