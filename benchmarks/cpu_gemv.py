"""Time the CPU kernels, one decode step of one linear, q-k-v or gated MLP at a time.

Beside each sparsity stand torch's own linear and oneDNN's on prepacked weights, interleaved in the
same loop, and the bandwidth of the weights really touched as a share of what a plain read reaches.
Weights rotate over at least four times the last-level cache, counting live rows alone, and other
memory twice its size is read before each timing.

    python benchmarks/cpu_gemv.py --models llama-3-8b --dtypes bfloat16 --threads 1,2 --json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wina.bench.probe import last_level_cache
from wina.kernels import sparse_gated_mlp, sparse_linear, sparse_linears
from wina.kernels.cpu import input_major, instruction_set, stream

# hidden, intermediate, key-value features
MODELS = {
    "llama-3-8b": (4096, 14336, 1024),
    "llama-3.2-1b": (2048, 8192, 512),
    "smollm2-135m": (576, 1536, 192),
}
CPU = torch.device("cpu")
Call = Callable[[int], object]


@dataclass
class Row:
    """One timed thing; times in milliseconds."""

    model: str
    op: str
    dtype: str
    threads: int
    kernel: str
    sparsity: float
    p20: float
    p50: float
    p80: float
    of_linear: float
    of_prepacked: float | None
    touched_gbps: float
    of_probe: float


@dataclass
class Op:
    """One operation on ``copies`` sets of weights: dense W's, each (out, in)."""

    name: str
    shapes: list[tuple[int, int]]

    def bytes(self, dtype: torch.dtype) -> int:
        return sum(a * b for a, b in self.shapes) * dtype.itemsize


def operations(model: str) -> list[Op]:
    hidden, wide, narrow = MODELS[model]
    return [
        Op("o", [(hidden, hidden)]),
        Op("k", [(narrow, hidden)]),
        Op("gate", [(wide, hidden)]),
        Op("down", [(hidden, wide)]),
        Op("qkv", [(hidden, hidden), (narrow, hidden), (narrow, hidden)]),
        Op("mlp", [(wide, hidden), (wide, hidden), (hidden, wide)]),
    ]


def threshold(inputs: int, sparsity: float) -> Tensor:
    """Return thresholds that drop this share of standard normal inputs."""
    if sparsity == 0:
        return torch.zeros(inputs)
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.5 + sparsity / 2))
    return torch.full((inputs,), level.item())


def dense(op: Op, x: Tensor, weights: list[list], linear: Callable) -> Call:
    def call(i: int) -> object:
        w = weights[i % len(weights)]
        if op.name != "mlp":
            return [linear(x, one) for one in w]
        return linear(functional.silu(linear(x, w[0])) * linear(x, w[1]), w[2])

    return call


def sparse(op: Op, x: Tensor, weights: list[list[Tensor]], sparsity: float) -> Call:
    vectors = [threshold(w.shape[1], sparsity) for w in weights[0]]
    if op.name == "mlp" and sparsity > 0:  # the hidden features are not normal: take the quantile
        gate, up, _ = weights[0]
        hidden = functional.silu(sparse_linear(x, gate, vectors[0]))
        hidden = (hidden * sparse_linear(x, up, vectors[1])).abs().float()
        vectors[2] = hidden.flatten().quantile(sparsity).expand(hidden.shape[-1]).contiguous()

    def call(i: int) -> object:
        w = weights[i % len(weights)]
        if op.name == "mlp":
            return sparse_gated_mlp(x, *w, *vectors)
        if op.name == "qkv":
            return sparse_linears(x, w, vectors)
        return sparse_linear(x, w[0], vectors[0])

    return call


def prepacked_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def measure(
    model: str, op: Op, dtype: torch.dtype, threads: int, sparsities: list[float], seconds: float
) -> list[Row]:
    torch.manual_seed(0)
    size = op.bytes(dtype)
    copies = max(2, math.ceil(4 * last_level_cache(CPU) / (size * (1 - max(sparsities)))))
    x = torch.randn(1, op.shapes[0][1]).to(dtype)
    plain = [torch.randn(shape).div(shape[1] ** 0.5).to(dtype) for shape in op.shapes]
    rows = [[w.clone() for w in plain] for _ in range(copies)]
    major = [[input_major(w) for w in plain] for _ in range(copies)]
    calls: dict[tuple[str, float], Call] = {
        ("linear", 0.0): dense(op, x, rows, functional.linear),
    }
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight
        packed = [[pack(w) for w in plain] for _ in range(copies)]
        prepacked_linear(x, packed[0][0])
        calls["prepacked", 0.0] = dense(op, x, packed, prepacked_linear)
    except RuntimeError:
        pass  # oneDNN lacks the dtype on this processor
    for sparsity in sparsities:
        calls["wina", sparsity] = sparse(op, x, major, sparsity)
    block = torch.ones(64 << 20)
    calls["probe", 0.0] = lambda _: stream(block)

    times: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
    flush = torch.ones(2 * last_level_cache(CPU) // 4)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 12 or time.perf_counter() < end:
        for key, call in calls.items():
            stream(flush)
            start = time.perf_counter()
            call(turn)
            times[key].append(time.perf_counter() - start)
        turn += 1

    def quantile(key: tuple[str, float], q: float) -> float:
        ordered = sorted(times[key][2:])
        return ordered[int(q * len(ordered))]

    probe = block.nbytes / quantile(("probe", 0.0), 0.5)
    table = []
    for key in calls:
        if key[0] == "probe":
            continue
        half = quantile(key, 0.5)
        speed = size * (1 - key[1]) / half
        other = quantile(("prepacked", 0.0), 0.5) if ("prepacked", 0.0) in calls else None
        table.append(
            Row(
                model,
                op.name,
                str(dtype).removeprefix("torch."),
                threads,
                *key,
                *(round(quantile(key, q) * 1e3, 4) for q in (0.2, 0.5, 0.8)),
                round(half / quantile(("linear", 0.0), 0.5), 3),
                None if other is None else round(half / other, 3),
                round(speed / 1e9, 2),
                round(speed / probe, 3),
            )
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-3-8b,llama-3.2-1b,smollm2-135m")
    parser.add_argument("--ops", default="o,k,gate,down,qkv,mlp")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--sparsities", default="0,0.25,0.5,0.65,0.8")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each operation")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sparsities = [float(part) for part in options.sparsities.split(",")]
    rows = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for name in options.dtypes.split(","):
            for model in options.models.split(","):
                for op in operations(model):
                    if op.name not in options.ops.split(","):
                        continue
                    dtype = getattr(torch, name)
                    found = measure(model, op, dtype, threads, sparsities, options.seconds)
                    rows += found
                    for row in [] if options.json else found:
                        print(*asdict(row).values(), sep="\t", flush=True)
    if options.json:
        report = {
            "device": platform.processor() or platform.machine(),
            "instruction_set": instruction_set(),
            "torch": torch.__version__,
            "last_level_cache": last_level_cache(CPU),
            "rows": [asdict(row) for row in rows],
        }
        json.dump(report, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
