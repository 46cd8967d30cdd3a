"""Greedy: TEAL's search for sparsities inside each block (arXiv 2408.14690, algorithm 1).

Every block gets the target sparsity. Within a block, sparsity is given out in small steps, each
to the linear where it raises the error of the block's output least.

A step saves the same number of weights in every linear, 2.5 % of the block's (TEAL: 5 %).
Departure: where that would be more than a fifth of a linear (k_proj of a grouped-query model is
smaller than one such step), the step is a fifth of it. So that steps of different size compare,
the least rise of squared error for each weight saved wins.

A candidate changes one linear. What it cannot have changed, the outputs of linears that run on
inputs from before, is not computed again (``_Replay``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wina.criteria import Criterion
from wina.layers import Phase
from wina.layers.linear import SparseLayer, make_dense, make_sparse, refresh
from wina.models import blocks, run_body
from wina.progress import track
from wina.selection import Selection, channels_kept
from wina.statistics import LinearStatistics, cumulative, value_at

STEP = 0.025  # of a block's weights
LONGEST = 0.2  # of a linear's channels
MOST = 0.95  # no linear goes beyond


@torch.no_grad()
def allocate_greedily(
    model: nn.Module,
    ids: Tensor,
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    selection: Selection,
    target: float,
    dense_prefix: int,
) -> Tensor:
    """Return each linear's sparsity: ``greedy_path`` to one target, the same for every block."""
    budgets = torch.full((1, len(blocks(model)[1])), target, dtype=torch.float64)
    return greedy_path(model, ids, statistics, criterion, selection, budgets, dense_prefix)[0]


@torch.no_grad()
def greedy_path(
    model: nn.Module,
    ids: Tensor,
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    selection: Selection,
    targets: Tensor,
    dense_prefix: int,
) -> Tensor:
    """Return each linear's sparsity at several targets that one search passes through.

    One dense forward pass goes through the model, and each block is searched while it is at the
    block, on the block's own dense inputs; no activation outlives its block.

    Args:
        model: dense, in evaluation mode.
        ids: calibration tokens, shape (batch, positions).
        statistics: of the linears to plan; those of experts and outside the blocks get the
            target.
        criterion: the scores.
        selection: how channels are chosen during the search.
        targets: sparsity of every block, in [0, 1), shape (targets, blocks), float64, rising.
        dense_prefix: first positions, which stay dense and do not count.

    Returns:
        Shape (targets, linears), float64.
    """
    sparsities = targets.mean(1, keepdim=True).repeat(1, len(statistics))
    members: dict[int, list[int]] = {}
    for index, linear in enumerate(statistics):
        if linear.site.block is not None and linear.site.expert is None:
            members.setdefault(linear.site.block, []).append(index)
    layers = blocks(model)[1]
    modules = dict(model.named_modules())
    progress = iter(track(range(len(layers)), "greedy allocation", len(layers)))

    def search(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        number = next(progress)
        handles[number].remove()
        indices = members.get(number, [])
        local = [statistics[index] for index in indices]
        if not local:
            return
        linears = [modules[linear.site.name] for linear in local]
        with _sparse(linears, local, criterion, selection, dense_prefix, ids) as gates:
            budgets = targets[:, number].tolist()
            sparsities[:, indices] = _search_block(
                block, args, kwargs, _hidden(output), local, gates, budgets, dense_prefix
            )

    handles: list[RemovableHandle] = [
        layer.register_forward_hook(search, with_kwargs=True) for layer in layers
    ]
    try:
        run_body(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return sparsities


def _search_block(
    block: nn.Module,
    args: Any,
    kwargs: Any,
    dense: Tensor,
    statistics: Sequence[LinearStatistics],
    gates: Sequence[_Gate],
    targets: Sequence[float],
    dense_prefix: int,
) -> Tensor:
    replay = _Replay([gate.layer for gate in gates])

    def error() -> float:
        output = _hidden(block(*args, **kwargs))
        return float((output - dense)[:, dense_prefix:].float().square().mean())

    with replay.start():
        error()
    sparsities = torch.zeros(len(statistics), dtype=torch.float64)
    weights = torch.tensor([linear.site.weights for linear in statistics], dtype=torch.float64)
    current = 0.0
    found = []
    for target in targets:
        budget = target * float(weights.sum())
        while (left := budget - float((sparsities * weights).sum())) > 0.5:
            best: tuple[float, float, int, float] | None = None
            for index, gate in enumerate(gates):
                equal = STEP * float(weights.sum() / weights[index])
                # The last step is no longer than the budget left.
                step = min(
                    equal, LONGEST, MOST - float(sparsities[index]), left / float(weights[index])
                )
                if step <= 1e-9:
                    continue
                gate.set(float(sparsities[index]) + step)
                with replay.changed(gate.layer):
                    after = error()
                gate.set(float(sparsities[index]))
                price = (after - current) / (step * float(weights[index]))
                if best is None or price < best[0]:
                    best = price, after, index, step
            if best is None:
                break
            _, current, index, step = best
            sparsities[index] += step
            gates[index].set(float(sparsities[index]))
            with replay.changed(gates[index].layer, keep=True):
                error()
        found.append(sparsities.clone())
    return torch.stack(found)


class _Replay:
    """Outputs of a block's linears as they stand, so that a candidate computes what follows it.

    Inputs are numbered in the order in which they come up. A linear whose input has the changed
    one's number, or a lower one, was given it before the changed one ran, and gives what it gave.
    """

    def __init__(self, layers: Sequence[SparseLayer]) -> None:
        self._layers = layers
        self._numbers: dict[SparseLayer, int] = {}
        self._outputs: dict[SparseLayer, tuple[Tensor, int]] = {}  # and its version

    @contextmanager
    def start(self) -> Iterator[None]:
        """Run the whole block, number the inputs and keep the outputs."""
        inputs: list[Tensor] = []
        calls: list[SparseLayer] = []

        def run(layer: SparseLayer, x: Tensor) -> Tensor:
            if not any(known is x for known in inputs):
                inputs.append(x)
            self._numbers[layer] = next(n for n, known in enumerate(inputs) if known is x)
            calls.append(layer)
            return self._computed(layer, x, keep=True)

        with self._instead(run):
            yield
        if len(set(calls)) < len(calls):  # one of them runs twice
            self._numbers.clear()

    @contextmanager
    def changed(self, changed: SparseLayer, *, keep: bool = False) -> Iterator[None]:
        """Run the block with one linear's gate changed; ``keep`` it so."""
        number = self._numbers.get(changed, -1)

        def run(layer: SparseLayer, x: Tensor) -> Tensor:
            if layer is not changed and self._numbers.get(layer, number + 1) <= number:
                found, version = self._outputs[layer]
                if found._version == version:  # else the block wrote into it
                    return found
            return self._computed(layer, x, keep)

        with self._instead(run):
            yield

    def _computed(self, layer: SparseLayer, x: Tensor, keep: bool) -> Tensor:
        y = type(layer).forward(layer, x)
        if keep:
            self._outputs[layer] = y, y._version
        return y

    @contextmanager
    def _instead(self, run: Callable[[SparseLayer, Tensor], Tensor]) -> Iterator[None]:
        try:
            for layer in self._layers:
                layer.forward = partial(run, layer)  # type: ignore[method-assign]
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)


class _Gate:
    """One linear of the block under search, its sparsity adjustable."""

    def __init__(self, layer: SparseLayer, linear: LinearStatistics, criterion: Criterion) -> None:
        self.layer = layer
        self.in_features = linear.site.in_features
        self.scale = criterion.scale(linear.facts).float().to(layer.vector.device)
        self.cumulated = cumulative(linear.counts(criterion))[None]

    def set(self, sparsity: float) -> None:
        """Drop this share of the linear's channels."""
        if self.layer.keep is None:
            cutoff = value_at(self.cumulated, torch.tensor([sparsity])).to(self.scale.device)
            zero = torch.zeros_like(self.scale)
            self.layer.vector.copy_(torch.where(cutoff > 0, cutoff / self.scale, zero))
        else:
            self.layer.keep = channels_kept(self.in_features, sparsity)
        refresh(self.layer)


@contextmanager
def _sparse(
    linears: Sequence[nn.Module],
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    selection: Selection,
    dense_prefix: int,
    ids: Tensor,
) -> Iterator[list[_Gate]]:
    """Make the linears sparse, dropping nothing yet; dense again at the end."""
    phase = Phase("sparse", dense_prefix)
    phase.rows = torch.arange(ids.shape[1], device=ids.device) >= dense_prefix
    gates = []
    try:
        for module, linear in zip(linears, statistics, strict=True):
            scale = criterion.scale(linear.facts).float().to(ids.device)
            vector = scale if selection == "topk" else torch.zeros_like(scale)
            keep = linear.site.in_features if selection == "topk" else None
            make_sparse(module, vector, selection, keep, phase)
            assert isinstance(module, SparseLayer)
            gates.append(_Gate(module, linear, criterion))
        yield gates
    finally:
        for module in linears:
            if isinstance(module, SparseLayer):
                make_dense(module)


def _hidden(output: Any) -> Tensor:
    """Return the hidden states among a block's outputs."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
