"""Which linears share an input, and which norm is in front of them: read off a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina.criteria.wina_kgate import KINDS_WITH_NORMS
from wina.models.structure import Site, find_sites, run_body


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that are given the same tensor.

    Attributes:
        leader: the one that holds k or gate.
        linears: qualified names of all, the leader too.
        features: their in_features.
        norm: qualified name of the norm whose output the tensor is; None if it is of another kind.
    """

    leader: str
    linears: tuple[str, ...]
    features: int
    norm: str | None


@torch.no_grad()
def input_groups(model: PreTrainedModel) -> list[InputGroup]:
    """Return the groups that have a leader, in order; a dense forward pass of two tokens.

    Experts are left out: each sees other tokens.
    """
    sites = [site for site in find_sites(model) if site.expert is None]
    modules = dict(model.named_modules())
    seen: dict[str, Tensor] = {}
    producers: list[tuple[str, Tensor]] = []

    def note_input(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, args[0])

        return hook

    def note_output(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                producers.append((name, output))

        return hook

    handles = [
        modules[site.name].register_forward_pre_hook(note_input(site.name)) for site in sites
    ]
    handles += [
        module.register_forward_hook(note_output(name))
        for name, module in modules.items()
        if _weight(module) is not None
    ]
    try:
        run_body(model, torch.tensor([[0, 1]], device=model.device))
    finally:
        for handle in handles:
            handle.remove()

    groups: dict[int, list[Site]] = {}
    for site in sites:
        if site.name in seen:
            groups.setdefault(id(seen[site.name]), []).append(site)
    found = []
    for members in groups.values():
        leader = next((site for site in members if site.kind in KINDS_WITH_NORMS), None)
        if leader is None:
            continue
        x = seen[leader.name]
        norm = next((name for name, output in producers if output is x), None)
        names = tuple(site.name for site in members)
        found.append(InputGroup(leader.name, names, leader.in_features, norm))
    return found


def _weight(module: nn.Module) -> Tensor | None:
    """Return the weight of what may be a norm: one number a channel."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 1 else None


@torch.no_grad()
def norm_scale(model: nn.Module, group: InputGroup) -> Tensor:
    """Return the scale d of the norm in front of a group, shape (features,), float32.

    It is measured, so that it does not matter how a family stores it (Gemma's norms multiply by
    1 + w): the difference of the norm's outputs for the two signs of a probe of ones with
    alternating signs, whose rms is one and whose mean is zero. Where d is zero it is one instead
    (the channel is always zero). Ones if there is no norm.
    """
    if group.norm is None:
        return torch.ones(group.features, device=next(model.parameters()).device)
    norm = model.get_submodule(group.norm)
    weight = norm.get_parameter("weight")
    probe = torch.ones(1, 1, group.features, dtype=weight.dtype, device=weight.device)
    probe[..., 1::2] = -1
    scale = ((norm(probe) - norm(-probe)) * probe / 2).flatten().float()
    return torch.where(scale.abs() > 1e-6 * scale.abs().max(), scale, 1.0)
