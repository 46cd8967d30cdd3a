"""Collect statistics while text streams through the model. No activation outlives its window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from wina.criteria import Criterion, criteria
from wina.errors import WinaError
from wina.layers.linear import matrix
from wina.models import Site, blocks, run_body
from wina.statistics import BINS, LinearStatistics, histogram

# Sums by name: "gradient/<linear>" and "square/<linear>" (in_features,) float64,
# "scores/<criterion>/<linear>" (BINS,) int64, "tokens/gradient" and "tokens/scores" () int64.
Sums = dict[str, Tensor]


def column_norms(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return ||W_:j||_2 of each linear, shape (in_features,), float32, on the model's device."""
    modules = dict(model.named_modules())
    weights = {site.name: matrix(modules[site.name]).detach() for site in sites}
    return {
        name: torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        for name, weight in weights.items()
    }


@contextmanager
def _inputs(
    model: nn.Module, sites: Sequence[Site], see: Callable[[Site, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``see`` with each linear's input; what it returns, if anything, replaces the input."""
    modules = dict(model.named_modules())

    def hook(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor] | None]:
        def observe(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            replaced = see(site, args[0])
            return None if replaced is None else (replaced,)

        return observe

    handles = [modules[site.name].register_forward_pre_hook(hook(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_gradients(
    model: PreTrainedModel, sites: Sequence[Site], ids: Tensor, skip: int, sums: Sums
) -> None:
    """Add sum over tokens of (dL/dx_j)^2 for one window.

    L is the summed negative log likelihood of the window's tokens after the first ``skip``. Each
    linear gets its own alias of x, so that the gradient is through that linear alone although
    q, k and v share an input. With gradient_checkpointed, the graph of one block is alive at a
    time.

    Args:
        model: parameters frozen, between ``gradient_checkpointed``.
        sites: the linears.
        ids: shape (1, positions).
        skip: first positions that count neither in L nor in the sums.
        sums: added to.
    """

    def see(site: Site, x: Tensor) -> Tensor | None:
        if not x.requires_grad:  # the first pass of a checkpointed block
            return None
        alias = x.view_as(x)

        def add(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])[skip:]
            _add(sums, f"gradient/{site.name}", rows.float().square().sum(0, dtype=torch.float64))

        alias.register_hook(add)  # type: ignore[no-untyped-call]
        return alias

    with _inputs(model, sites, see), torch.enable_grad():
        logits = model(ids, use_cache=False).logits[0, skip:-1]
        loss = functional.cross_entropy(logits.float(), ids[0, skip + 1 :], reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
    _add(sums, "tokens/gradient", torch.tensor(ids.shape[1] - skip))


@contextmanager
def gradient_checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Freeze the parameters and checkpoint the blocks; restore everything at the end.

    Transformers checkpoints a block only in training mode, so the blocks alone, not what is in
    them, are put into it: dropout stays off. The blocks' own switch is used, since
    ``gradient_checkpointing_disable`` leaves hooks behind.
    """
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = [x for x in blocks(model)[1] if isinstance(x, GradientCheckpointingLayer)]
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    for parameter in frozen:
        parameter.requires_grad_(False)
    switch = {
        "training": True,
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
    }
    before = [vars(layer).copy() for layer in layers]
    for layer in layers:
        vars(layer).update(switch)
    try:
        yield
    finally:
        handle.remove()
        for layer, attributes in zip(layers, before, strict=True):
            for name in switch:
                del vars(layer)[name]
            vars(layer).update({name: attributes[name] for name in switch if name in attributes})
        for parameter in frozen:
            parameter.requires_grad_(True)


@torch.no_grad()
def add_scores(
    model: PreTrainedModel,
    sites: Sequence[Site],
    scales: Mapping[str, Mapping[str, Tensor]],
    ids: Tensor,
    skip: int,
    sums: Sums,
) -> None:
    """Add sum over tokens of x_j^2 and the histograms of all criteria's scores for one window.

    Args:
        model: dense or sparse; what is seen is each linear's input before its gate.
        sites: the linears.
        scales: s_j by criterion and linear, shape (in_features,), float32, on the model's device.
        ids: shape (1, positions).
        skip: first positions that do not count.
        sums: added to.
    """

    def see(site: Site, x: Tensor) -> None:
        magnitudes = x.reshape(-1, x.shape[-1])[skip:].abs().float()
        square = magnitudes.square().sum(0, dtype=torch.float64)
        if not bool(square.isfinite().all()):
            raise WinaError(
                f"the input of {site.name} holds NaN or infinity: the model is broken or its "
                "dtype too narrow; try --dtype bfloat16 or float32"
            )
        _add(sums, f"square/{site.name}", square)
        for criterion, by_name in scales.items():
            counts = histogram(magnitudes * by_name[site.name])
            _add(sums, f"scores/{criterion}/{site.name}", counts)

    with _inputs(model, sites, see):
        run_body(model, ids, with_head=any(site.block is None for site in sites))
    _add(sums, "tokens/scores", torch.tensor(ids.shape[1] - skip))


def _add(sums: Sums, name: str, values: Tensor) -> None:
    if name in sums:
        sums[name] += values
    else:
        sums[name] = values


def gradient_rms(site: Site, sums: Sums) -> Tensor | None:
    """Return rms over tokens of dL/dx_j, shape (in_features,), float32; None if not collected."""
    total = sums.get(f"gradient/{site.name}")
    if total is None:
        return None
    return (total / sums["tokens/gradient"].to(total.device)).sqrt().float()


def collectable(with_gradient: bool) -> list[Criterion]:
    """Return the registered criteria that can be scored with or without gradients."""
    known = [criteria.get(name) for name in criteria]
    return [criterion for criterion in known if with_gradient or not criterion.needs_gradient]


def to_statistics(
    sites: Sequence[Site], norms: Mapping[str, Tensor], sums: Sums
) -> list[LinearStatistics]:
    """Return what the sums say of each linear, on the CPU."""
    names = sorted({name.split("/")[1] for name in sums if name.startswith("scores/")})
    statistics = []
    for site in sites:
        rms = gradient_rms(site, sums)
        square = sums[f"square/{site.name}"] / sums["tokens/scores"].to(norms[site.name].device)
        statistics.append(
            LinearStatistics(
                site=site,
                column_norm=norms[site.name].cpu(),
                mean_square=square.float().cpu(),
                gradient_rms=None if rms is None else rms.cpu(),
                histograms={
                    name: sums[f"scores/{name}/{site.name}"].cpu().reshape(BINS) for name in names
                },
            )
        )
    return statistics
