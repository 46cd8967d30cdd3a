"""Find what to sparsify by structure: the linears inside the decoder's repeated block.

No model family is named here (wina.models.families holds the little that structure cannot tell).
A decoder is the module that Transformers' own ``get_decoder`` returns; its blocks are the longest
list of modules in it that hold linears.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina.errors import UsageError
from wina.layers.experts import ExpertLinear, OpenExperts, opened
from wina.layers.linear import features, is_linear
from wina.layers.swap import find_decoder
from wina.models.families import family_of


@dataclass(frozen=True)
class Site:
    """A linear that may be sparsified.

    Attributes:
        name: its qualified name in the model.
        kind: such as ``k_proj``: the last part of the name, unless the family has a name of its
            own for a common kind.
        block: index of its decoder block; None outside the blocks (lm_head).
        expert: index of the expert it belongs to; None outside experts.
    """

    name: str
    kind: str
    block: int | None
    in_features: int
    out_features: int
    expert: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights: the cost of a token that goes through it."""
        return self.in_features * self.out_features


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the qualified name and the list of the decoder's repeated blocks.

    Raises:
        UsageError: there are none; wina needs a stack of blocks with nn.Linear or Conv1D.
    """
    decoder = find_decoder(model)
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(module is part for part in decoder.modules())
        # A block has linears in it; a list of bare ones (Gemma 3n has some) is none of blocks.
        and any(
            is_linear(part) for block in module for part in block.modules() if part is not block
        )
    ]
    if not candidates:
        raise UsageError(
            f"unsupported architecture {type(model).__name__}: no list of decoder blocks with "
            "nn.Linear or Conv1D layers was found in it"
        )
    # Outer lists come before the lists inside them; blocks outnumber anything else outside them.
    outer = [
        (name, module)
        for name, module in candidates
        if not any(name.startswith(f"{other}.") for other, _ in candidates if other != name)
    ]
    return max(outer, key=lambda item: len(item[1]))


def check_bare(model: nn.Module) -> None:
    """Raise UsageError if the model is wrapped in adapters."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise UsageError(
            "the model is wrapped by PEFT: merge its adapters first (model.merge_and_unload()) and "
            "calibrate what comes of it; or make the base model sparse before adapters are put on"
        )


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """Raise UsageError unless the model decodes: causal, with a key-value cache."""
    check_bare(model)
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"unsupported architecture {name}: it has no key-value cache")
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    one, other = model(ids, use_cache=False).logits[:, 0].float()
    # Rounding apart, what follows must not matter; an encoder's difference is of the logits' size.
    if (one - other).abs().max() > 0.01 * one.std():
        raise UsageError(f"unsupported architecture {name}: its tokens see those after them")


def context_limit(model: PreTrainedModel) -> int | None:
    """Return the positions that the model can hold, if it says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def find_sites(model: nn.Module, include_head: bool = False) -> list[Site]:
    """Return the linears of the blocks in order, and the head last if asked for.

    Raises:
        UsageError: the architecture is not supported.
    """
    family = family_of(model)
    if family.refusal is not None:
        raise UsageError(f"unsupported architecture {type(model).__name__}: {family.refusal}")
    prefix, layers = blocks(model)
    with opened(model):
        routers = _routers(model)
        named = [
            (f"{prefix}.{index}.{name}", module, index)
            for index, block in enumerate(layers)
            for name, module in block.named_modules()
            if is_linear(module)
        ]
        sites = [
            Site(
                name,
                family.kind(name),
                index,
                *features(module),
                module.expert if isinstance(module, ExpertLinear) else None,
            )
            for name, module, index in named
            if name not in routers and not family.stays_dense(name)
        ]
    if include_head:
        sites.append(_head(model))
    return sites


def _routers(model: nn.Module) -> set[str]:
    """Return the names of the linears beside experts that give each of them, or all, one number."""
    modules = dict(model.named_modules())
    found = set()
    for name, module in modules.items():
        if isinstance(module, OpenExperts):
            parent = name.rpartition(".")[0]
            for inner, part in modules[parent].named_modules():
                numbers = (1, len(module.get_parameter("down_proj")))
                if is_linear(part) and features(part)[1] in numbers:
                    found.add(f"{parent}.{inner}")
    return found


@torch.no_grad()
def called_sites(model: PreTrainedModel, sites: Sequence[Site]) -> list[Site]:
    """Return the sites whose linear a forward pass calls; the others cannot be sparsified.

    A block that reads the weights of a linear without calling it (a fused kernel) goes by any gate
    in front of it.
    """
    modules = dict(model.named_modules())
    called = {site.name for site in sites if site.expert is not None}  # few of them see a token
    handles = [
        modules[site.name].register_forward_pre_hook(
            lambda _m, _a, name=site.name: called.add(name)
        )
        for site in sites
        if site.expert is None
    ]
    try:
        run_body(model, torch.tensor([[0, 1]], device=model.device), with_head=True)
    finally:
        for handle in handles:
            handle.remove()
    return [site for site in sites if site.name in called]


def run_body(model: nn.Module, ids: Tensor, with_head: bool = False) -> None:
    """Run the decoder over ``ids`` (batch, positions) for its hooks' sake; the head if asked."""
    if with_head:
        model(ids, use_cache=False)
    else:
        find_decoder(model)(input_ids=ids, use_cache=False)


def _head(model: nn.Module) -> Site:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    for name, module in model.named_modules():
        if head is not None and module is head and is_linear(module):
            return Site(name, name.rpartition(".")[2], None, *features(module))
    raise UsageError(f"{type(model).__name__} has no linear output head to include")
