"""Each kind of linear by itself, against the roofline: its time and the bytes it reads."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from wina.bench.probe import Probe, last_level_cache, synchronize
from wina.kernels import sparse_linear
from wina.kernels.cpu.library import input_major
from wina.layers.linear import matrix, read_by_others
from wina.models import Site, find_sites, run_body
from wina.plan import Plan
from wina.progress import track

ROUNDS = 9
SQUARE = 1_024  # of the matrix product that measures the compute roof
CACHES = 8  # times the last-level cache that the copies of a weight take in all
MOST = 512  # copies; of weights so small that these fit a cache, calls cost more than bytes do
LARGEST = 256 << 20  # bytes of all copies


class OperatorTiming(BaseModel):
    """One kind of linear at batch 1, dense or under a plan.

    Attributes:
        plan: number of the plan; None for the dense linear.
        sparsity: share of the input channels that the timed inputs dropped.
        operations: multiplications and additions of a call.
        bytes: of weights, thresholds, inputs and outputs that a call reads or writes.
        microseconds: of a call, the median of rounds.
    """

    kind: str
    in_features: int
    out_features: int
    plan: int | None
    sparsity: float
    operations: float
    bytes: float
    microseconds: float


class Roofline(BaseModel):
    """Timings of operators beside the two roofs of the machine, from the same rounds.

    Attributes:
        read_bandwidth_gbps: of a plain read of memory, GB/s.
        compute_gflops: of a square matrix product in the same dtype, GFLOP/s.
    """

    read_bandwidth_gbps: float
    compute_gflops: float
    threads: int
    operators: list[OperatorTiming]


class _Contender:
    """A kind of linear with its inputs and enough copies of its weights that no cache helps."""

    def __init__(
        self, calls: Sequence[Callable[[], Tensor]], facts: dict[str, object], device: torch.device
    ) -> None:
        self.calls, self.facts, self.device = calls, facts, device
        self.seconds: list[float] = []

    def run(self) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        for call in self.calls:
            call()
        synchronize(self.device)
        self.seconds.append((time.perf_counter() - start) / len(self.calls))

    def timing(self) -> OperatorTiming:
        microseconds = statistics.median(self.seconds) * 1e6
        return OperatorTiming.model_validate({**self.facts, "microseconds": microseconds})


@torch.no_grad()
def roofline(
    model: PreTrainedModel, plans: Sequence[Plan], ids: Tensor, rounds: int = ROUNDS
) -> Roofline:
    """Time each kind of linear of a model's blocks, dense and under each plan, in turns.

    The inputs are those of the dense model at the last position of a text. The weights of a kind
    rotate over copies of the blocks', so that they come from memory and not from a cache. Experts
    are left out, and linears that another library keeps.

    Args:
        model: dense; it stays as it is.
        plans: with threshold selection.
        ids: a text, shape (1, positions).
        rounds: turns; medians are over them.
    """
    device = model.device
    foreign = set(read_by_others(model))
    sites = [x for x in find_sites(model) if x.expert is None and x.name not in foreign]
    inputs = _last_inputs(model, sites, ids.to(device))
    modules = dict(model.named_modules())
    probe = Probe(device)
    square = torch.randn(SQUARE, SQUARE, device=device, dtype=model.dtype)
    compute: list[float] = []
    found = []
    kinds = list(dict.fromkeys((x.kind, x.in_features, x.out_features) for x in sites))
    for kind in track(kinds, "timing operators", len(kinds)):
        members = [x for x in sites if (x.kind, x.in_features, x.out_features) == kind]
        contenders = _contenders(modules, members, inputs, plans)
        for _ in range(rounds):
            probe.run()
            synchronize(device)
            start = time.perf_counter()
            torch.mm(square, square)
            synchronize(device)
            compute.append(time.perf_counter() - start)
            for contender in contenders:
                contender.run()
        found += [contender.timing() for contender in contenders]
    return Roofline(
        read_bandwidth_gbps=probe.gbps,
        compute_gflops=2 * SQUARE**3 / statistics.median(compute) / 1e9,
        threads=torch.get_num_threads(),
        operators=found,
    )


def _last_inputs(model: PreTrainedModel, sites: Sequence[Site], ids: Tensor) -> dict[str, Tensor]:
    """Return each linear's input at the last position, shape (1, in_features)."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1])[-1:].clone()

        return hook

    handles = [modules[x.name].register_forward_pre_hook(keep(x.name)) for x in sites]
    try:
        run_body(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _contenders(
    modules: dict[str, nn.Module],
    members: Sequence[Site],
    inputs: dict[str, Tensor],
    plans: Sequence[Plan],
) -> list[_Contender]:
    """Return the dense contender of one kind, and one for each plan that covers it."""
    first = matrix(modules[members[0].name])
    device, width = first.device, first.element_size()
    size = first.numel() * width
    # What a sparse plan leaves of the copies must still be more than the cache holds.
    copies = min(MOST, math.ceil(CACHES * last_level_cache(device) / size), LARGEST // size)
    copies = max(2, copies)
    used = list(islice(cycle(members), copies))
    weights = [matrix(modules[x.name]).detach().clone() for x in used]
    in_features, out_features = members[0].in_features, members[0].out_features
    small = (in_features + out_features) * width

    def facts(plan: int | None, sparsity: float, extra: float) -> dict[str, object]:
        live = (1 - sparsity) * in_features
        return {
            "kind": members[0].kind,
            "in_features": in_features,
            "out_features": out_features,
            "plan": plan,
            "sparsity": sparsity,
            "operations": 2 * live * out_features,
            "bytes": live * out_features * width + small + extra,
        }

    def dense(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.linear(x, weight)

    def sparse(x: Tensor, weight: Tensor, thresholds: Tensor) -> Callable[[], Tensor]:
        return lambda: sparse_linear(x, weight, thresholds)

    pairs = list(zip(used, weights, strict=True))
    made = [_Contender([dense(inputs[x.name], w) for x, w in pairs], facts(None, 0.0, 0.0), device)]
    turned = [(x, input_major(w)) for x, w in pairs]
    for number, plan in enumerate(plans):
        if any(x.name not in plan.vectors for x in members) or plan.parts:
            continue
        thresholds = {x.name: plan.vectors[x.name].to(device) for x in members}
        shares = [
            float((inputs[x.name].abs().float() < thresholds[x.name]).float().mean()) for x in used
        ]
        sparsity = sum(shares) / len(shares)
        calls = [sparse(inputs[x.name], w, thresholds[x.name]) for x, w in turned]
        made.append(_Contender(calls, facts(number, sparsity, 4 * in_features), device))
    return made
