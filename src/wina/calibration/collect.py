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
from wina.layers import opened
from wina.layers.experts import ExpertLinear
from wina.layers.foreign import check_computes, differentiable, is_foreign
from wina.layers.linear import matrix
from wina.models import Site, blocks, run_body
from wina.statistics import BINS, LinearStatistics, experts, histogram

# Sums over tokens by name: "gradient/<linear>" of g_j^2, "cost/<linear>" of x_j^2 g_j^2,
# "power/<linear>" of x_j^2 where gradients were taken and "square/<linear>" where scores were,
# all (in_features,) float64; "scores/<criterion>/<linear>" (BINS,) int64; "tokens/gradient" and
# "tokens/scores" () int64; and of experts' linears also "rows/gradient/<linear>" and
# "rows/scores/<linear>", the routed tokens.
Sums = dict[str, Tensor]

NEXT_TO_NOTHING = 1e-9  # of the mean power of a linear's channels


def column_norms(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return ||W_:j||_2 of each linear, shape (in_features,), float32, on the model's device.

    Raises:
        UsageError: a linear that another library keeps does not compute W x + b.
    """
    with opened(model):
        modules = dict(model.named_modules())
        norms = {}
        for site in sites:
            module = modules[site.name]
            weight = matrix(module).detach()
            if is_foreign(module):
                check_computes(site.name, module, weight)
            norms[site.name] = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        return norms


Rows = Callable[[Tensor], Tensor]  # (..., features) -> the rows that count, (rows, features)


@contextmanager
def _inputs(
    model: nn.Module,
    sites: Sequence[Site],
    skip: int,
    see: Callable[[Site, Tensor, Rows], Tensor | None],
) -> Iterator[None]:
    """Call ``see`` with each linear's input; what it returns, if anything, replaces the input.

    ``see`` also gets what takes the counted rows of the input, and of its gradient: those of
    positions from ``skip`` on. An expert's input has the rows that are routed to it.
    """

    def rows_of(module: nn.Module) -> Rows:
        places = module.places if isinstance(module, ExpertLinear) else None

        def rows(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            return flat[skip:] if places is None else flat[places >= skip]

        return rows

    def hook(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor] | None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            replaced = see(site, args[0], rows_of(module))
            return None if replaced is None else (replaced,)

        return observe

    with opened(model):
        modules = dict(model.named_modules())
        handles = [modules[site.name].register_forward_pre_hook(hook(site)) for site in sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def add_gradients(
    model: PreTrainedModel, sites: Sequence[Site], ids: Tensor, skip: int, sums: Sums
) -> None:
    """Add sums over tokens of g_j^2, x_j^2 g_j^2 and x_j^2 for one window, g_j = dL/dx_j.

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

    def see(site: Site, x: Tensor, rows: Rows) -> Tensor | None:
        if not x.requires_grad:  # the first pass of a checkpointed block
            return None
        alias = x.view_as(x)
        power = rows(x.detach()).float().square()

        def add(gradient: Tensor) -> None:
            square = rows(gradient).float().square()
            _add(sums, f"gradient/{site.name}", square.sum(0, dtype=torch.float64))
            _add(sums, f"cost/{site.name}", (power * square).sum(0, dtype=torch.float64))
            _add(sums, f"power/{site.name}", power.sum(0, dtype=torch.float64))
            if site.expert is not None:
                _add(sums, f"rows/gradient/{site.name}", torch.tensor(len(square)))

        alias.register_hook(add)  # type: ignore[no-untyped-call]
        return alias

    with _inputs(model, sites, skip, see), torch.enable_grad():
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
        # No dropout is left to repeat, and a CUDA graph cannot hold the generator's state.
        "_gradient_checkpointing_func": partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        ),
    }
    before = [vars(layer).copy() for layer in layers]
    for layer in layers:
        vars(layer).update(switch)
    try:
        with differentiable(model):
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

    def see(site: Site, x: Tensor, rows: Rows) -> None:
        magnitudes = rows(x).abs().float()
        square = magnitudes.square().sum(0, dtype=torch.float64)
        if not bool(square.isfinite().all()):
            raise WinaError(
                f"the input of {site.name} holds NaN or infinity: the model is broken or its "
                "dtype too narrow; try --dtype bfloat16 or float32"
            )
        _add(sums, f"square/{site.name}", square)
        if site.expert is not None:
            _add(sums, f"rows/scores/{site.name}", torch.tensor(len(magnitudes)))
        for criterion, by_name in scales.items():
            counts = histogram(magnitudes * by_name[site.name])
            _add(sums, f"scores/{criterion}/{site.name}", counts)

    with _inputs(model, sites, skip, see):
        run_body(model, ids, with_head=any(site.block is None for site in sites))
    _add(sums, "tokens/scores", torch.tensor(ids.shape[1] - skip))


def _add(sums: Sums, name: str, values: Tensor) -> None:
    if name in sums:
        sums[name] += values
    else:
        sums[name] = values


def gradient_rms(sites: Sequence[Site], sums: Sums) -> dict[str, Tensor | None]:
    """Return the rms over tokens of dL/dx_j by linear, each token weighted by x_j^2.

    What dropping x_j costs is E[x_j^2 g_j^2], and x_j^2 and g_j^2 do not vary independently:
    where a norm follows the linear, tokens with a small output have a gradient as large as the
    output is small, and E[x_j^2] E[g_j^2] can be a hundred times too much. So each token weighs
    as much as its input; a channel that never had one gets its plain rms. For an expert's linear
    the tokens are those routed to it.

    Returns:
        each (in_features,) float32, or None if gradients were not collected.
    """
    if "tokens/gradient" not in sums:
        return dict.fromkeys((site.name for site in sites), None)
    plain, cost, power = (
        _mean_squares(sites, sums, what, "gradient") for what in ("gradient", "cost", "power")
    )
    found: dict[str, Tensor | None] = {}
    for name, square in power.items():
        little = (NEXT_TO_NOTHING * square.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        found[name] = ((cost[name] + little * plain[name]) / (square + little)).sqrt().float()
    return found


def _mean_squares(sites: Sequence[Site], sums: Sums, what: str, stage: str) -> dict[str, Tensor]:
    """Return mean squares by linear, (in_features,) float64."""
    tokens = int(sums[f"tokens/{stage}"])
    means = {
        site.name: sums[f"{what}/{site.name}"] / tokens for site in sites if site.expert is None
    }
    for layer in experts.by_layer(sites):
        names = [site.name for site in layer if f"{what}/{site.name}" in sums]
        totals = {name: sums[f"{what}/{name}"] for name in names}
        rows = {name: int(sums[f"rows/{stage}/{name}"]) for name in names}
        means |= experts.mean_squares(layer, totals, rows)
    return means


def collectable(with_gradient: bool) -> list[Criterion]:
    """Return the registered criteria that can be scored with or without gradients."""
    known = [criteria.get(name) for name in criteria]
    return [criterion for criterion in known if with_gradient or not criterion.needs_gradient]


def to_statistics(
    sites: Sequence[Site], norms: Mapping[str, Tensor], sums: Sums
) -> list[LinearStatistics]:
    """Return what the sums say of each linear, on the CPU."""
    names = sorted({name.split("/")[1] for name in sums if name.startswith("scores/")})
    gradients = gradient_rms(sites, sums)
    squares = _mean_squares(sites, sums, "square", "scores")
    tokens = int(sums["tokens/scores"])
    statistics = []
    for site in sites:
        rms = gradients[site.name]
        seen = tokens if site.expert is None else int(sums.get(f"rows/scores/{site.name}", 0))
        statistics.append(
            LinearStatistics(
                site=site,
                column_norm=norms[site.name].cpu(),
                mean_square=squares[site.name].float().cpu(),
                gradient_rms=None if rms is None else rms.cpu(),
                histograms={},
                usage=seen / tokens,
            )
        )
    for name in names:
        counts = score_counts(statistics, criteria.get(name), sums)
        for linear in statistics:
            linear.histograms[name] = counts[linear.site.name]
    return statistics


def score_counts(
    statistics: Sequence[LinearStatistics], criterion: Criterion, sums: Sums
) -> dict[str, Tensor]:
    """Return the histogram of a criterion's scores by linear, (BINS,) int64, on the CPU.

    Args:
        statistics: of the linears; their histograms are not looked at.
        criterion: whose scores.
        sums: from ``add_scores``.
    """
    prefix = f"scores/{criterion.name}/"
    found = {
        name.removeprefix(prefix): counts.cpu().reshape(BINS)
        for name, counts in sums.items()
        if name.startswith(prefix)
    }
    by_name = {linear.site.name: linear for linear in statistics}
    for layer in experts.by_layer([linear.site for linear in statistics]):
        scales = {site.name: criterion.scale(by_name[site.name].facts) for site in layer}
        squares = {site.name: by_name[site.name].mean_square for site in layer}
        found |= experts.histograms(layer, found, scales, squares)
    return found
