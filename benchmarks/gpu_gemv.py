"""Time the GPU kernels: one decode step of one linear, q-k-v or gated MLP at a time.

Launches are captured in CUDA graphs, one after the other as in a decode step, over as many sets of
weights as exceed the second-level cache four times, counting live rows alone. Beside each sparsity
stand cuBLAS on the usual and on the input-major layout, for the chains (a norm, projections, an
activation, a residual) the dense chain compiled by torch, and the bandwidth of the weights really
touched as a share of what a plain read reaches in the same run.

    python benchmarks/gpu_gemv.py --models llama-3-8b --json
    python benchmarks/gpu_gemv.py --quick --tune configurations.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from wina.kernels import available_backends, reference, use_backend
from wina.kernels.cuda.rows import TOKENS, Config
from wina.kernels.cuda.table import TABLE
from wina.kernels.cuda.tune import tune
from wina.kernels.measured import device_kind, fields_of
from wina.kernels.replay import CACHES, Replay, level_of
from wina.kernels.shapes import Shape, step_shapes

# hidden, intermediate, query and key-value features
MODELS = {
    "llama-3-8b": (4096, 14336, 4096, 1024),
    "llama-3.2-1b": (2048, 8192, 2048, 512),
    "qwen2.5-7b": (3584, 18944, 3584, 512),
    "phi-4": (5120, 17920, 5120, 1280),
}
EPSILON = 1e-5
DEVICE = torch.device("cuda")


@dataclass
class Row:
    """One timed thing; times in microseconds."""

    model: str
    op: str
    dtype: str
    tokens: int
    kernel: str
    sparsity: float
    p20: float
    p50: float
    p80: float
    of_dense: float
    touched_gbps: float
    of_probe: float


@dataclass(frozen=True)
class Op:
    """Projections, given as (inputs, outputs) each.

    Attributes:
        kind: linear, linears (of one input) or mlp (gate, up, down).
        normed: a norm before.
        added: a residual after.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, int], ...]
    normed: bool = False
    added: bool = False

    @property
    def weights(self) -> int:
        return sum(a * b for a, b in self.shapes)


def operations(model: str) -> list[Op]:
    hidden, wide, heads, narrow = MODELS[model]
    qkv = ((hidden, heads), (hidden, narrow), (hidden, narrow))
    mlp = ((hidden, wide), (hidden, wide), (wide, hidden))
    return [
        Op("up", "linear", mlp[1:2]),
        Op("down", "linear", mlp[2:]),
        Op("o", "linear", ((heads, hidden),)),
        Op("qkv in one", "linear", ((hidden, heads + 2 * narrow),)),
        Op("norm-qkv", "linears", qkv, normed=True),
        Op("o-add", "linear", ((heads, hidden),), added=True),
        Op("norm-mlp-add", "mlp", mlp, normed=True, added=True),
    ]


def shapes(model: str) -> list[Shape]:
    """Return the launches of a decode step, and up and q-k-v alone."""
    hidden, wide, heads, narrow = MODELS[model]
    alone = [Shape(hidden, (wide,)), Shape(hidden, (heads + 2 * narrow,))]
    return step_shapes(hidden, wide, heads, narrow) + alone


class Bench:
    """One operation's tensors and ways to compute it."""

    def __init__(self, op: Op, tokens: int, dtype: torch.dtype, live: float) -> None:
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self.op = op
        self.copies = max(2, math.ceil(CACHES * cache / (op.weights * dtype.itemsize * live)))
        inputs = op.shapes[0][0]
        self.x = [torch.randn(tokens, inputs, device=DEVICE).to(dtype) for _ in range(self.copies)]
        self.norm = torch.ones(inputs, device=DEVICE, dtype=dtype)
        self.residual = torch.randn(tokens, op.shapes[-1][1], device=DEVICE).to(dtype)
        self.weights = [
            [torch.randn(a, b, device=DEVICE, dtype=dtype).mul_(a**-0.5).t() for a, b in op.shapes]
            for _ in range(self.copies)
        ]
        self.thresholds = [torch.zeros(a, device=DEVICE) for a, _ in op.shapes]

    def drop(self, sparsity: float) -> None:
        for vector in self.thresholds:
            vector.fill_(level_of(sparsity))
        if self.op.kind == "mlp" and sparsity > 0:  # the hidden features are not normal
            gate, up, _ = self.weights[0]
            x = reference.rms_norm(self.x[0], self.norm, EPSILON) if self.op.normed else self.x[0]
            x = reference.drop(x, self.thresholds[0])
            hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
            self.thresholds[2].fill_(hidden.abs().float().flatten().quantile(sparsity).item())

    def sparse(self) -> Replay:
        op, residual = self.op, [self.residual] if self.op.added else []
        norm = [self.norm] if op.normed else []

        def run(i: int) -> object:
            x, w, t = self.x[i], self.weights[i], self.thresholds
            if op.kind == "mlp":
                arguments = (x, norm, EPSILON, w, t, "silu", [], residual)
                return torch.ops.wina.fused_gated_mlp(*arguments)
            return torch.ops.wina.fused_linears(x, norm, EPSILON, w, t, [], residual)

        return Replay(run, self.copies)

    def dense(self, usual: bool, compiled: bool = False) -> Replay:
        weights = self.weights
        if usual:
            weights = [[w.contiguous() for w in some] for some in weights]
        call: Callable[..., object] = torch.compile(self.step, dynamic=False)
        call = call if compiled else self.step
        return Replay(lambda i: call(self.x[i], weights[i]), self.copies)

    def step(self, x: Tensor, weights: list[Tensor]) -> object:
        if self.op.normed:
            x = reference.rms_norm(x, self.norm, EPSILON)
        if self.op.kind == "mlp":
            gate, up, down = weights
            y = functional.linear(x, gate)
            found = [functional.linear(functional.silu(y) * functional.linear(x, up), down)]
        else:
            found = [functional.linear(x, w) for w in weights]
        if self.op.added:
            found[0] = self.residual + found[0]
        return found


def read_bandwidth() -> float:
    """Return bytes a second of a plain read of 4 GiB."""
    block = torch.ones(1 << 30, device=DEVICE)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        block.amax()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return block.nbytes / sorted(times)[len(times) // 2]


def measure(
    model: str, op: Op, dtype: torch.dtype, tokens: int, options: argparse.Namespace, probe: float
) -> list[Row]:
    torch.manual_seed(0)
    bench = Bench(op, tokens, dtype, 1 - max(options.sparsities))
    # The dense ones first: what is compiled here sees the weights that all others see.
    runs: dict[str, Replay] = {
        "cublas": bench.dense(usual=True),
        "cublas input-major": bench.dense(usual=False),
    }
    if op.normed or op.added or op.kind != "linear":
        runs["compiled"] = bench.dense(usual=True, compiled=True)
    rows: list[Row] = []
    best = math.inf

    def add(kernel: str, sparsity: float, replay: Replay) -> None:
        nonlocal best
        time = replay.time(options.replays)
        best = min(best, time.p50) if sparsity < 0 else best
        share = 1 - max(sparsity, 0.0)
        touched = op.weights * dtype.itemsize * share / time.p50 / 1e3
        name = str(dtype).removeprefix("torch.")
        place = (model, op.name, name, tokens, kernel, max(sparsity, 0.0))
        times = (round(t, 2) for t in asdict(time).values())
        speed = (round(time.p50 / best, 3), round(touched, 1), round(touched * 1e9 / probe, 3))
        rows.append(Row(*place, *times, *speed))

    for kernel, replay in runs.items():
        add(kernel, -1.0, replay)
    for backend in options.backends.split(","):
        with use_backend(backend):
            replay = bench.sparse()
        for sparsity in options.sparsities:
            bench.drop(sparsity)
            add(f"wina {backend}", sparsity, replay)
    return rows


def tune_all(models: list[str], options: argparse.Namespace) -> dict[str, object]:
    """Tune the shapes of models; write the table and return all that was timed."""
    found: dict[str, Config | None] = {}
    tried: list[dict[str, object]] = []
    kind, path = device_kind(0), Path(options.tune)
    report: dict[str, object] = {}

    def log(key: str, config: Config, times: dict[float, float]) -> None:
        tried.append({"shape": key, **asdict(config), "us": times})

    for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
        for model in models:
            for shape in shapes(model)[: options.shapes]:
                for tokens in map(int, options.tuned_tokens.split(",")):
                    found[shape.key(tokens, dtype)] = tune(shape, tokens, dtype, log=log)
                    entries = {key: fields_of(one) for key, one in found.items()}
                    report = {"table": {kind: entries}, "tried": tried}
                    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    TABLE.remember(kind, found)
    return report


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-3-8b")
    parser.add_argument("--ops", default="", help="names by comma; all by default")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--sparsities", type=numbers, default=[0.0, 0.25, 0.5, 0.65, 0.8])
    parser.add_argument("--backends", default="auto", help="auto, cuda or triton, by comma")
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="fewer replays")
    parser.add_argument("--tune", metavar="FILE", help="tune first; write what was found there")
    parser.add_argument("--tuned-tokens", default="1", help=f"of {TOKENS}, by comma")
    parser.add_argument("--shapes", type=int, default=None, help="tune only the first so many")
    parser.add_argument("--json", metavar="FILE", help="write all figures there; - prints them")
    options = parser.parse_args(arguments)
    unknown = set(options.models.split(",")) - set(MODELS)
    if unknown:
        parser.error(f"unknown models {sorted(unknown)}; known: {', '.join(MODELS)}")
    for sparsity in options.sparsities:
        if not 0 <= sparsity < 1:
            parser.error(f"sparsities must lie in [0, 1); got {sparsity}")
    if options.quick:
        options.replays = min(options.replays, 20)
    return options


def show(rows: list[Row], probe: float) -> None:
    print(f"{torch.cuda.get_device_name()}, plain read {probe / 1e9:.0f} GB/s, times in us")
    columns = [
        "op",
        "tokens",
        "kernel",
        "sparsity",
        "p20",
        "p50",
        "p80",
        "of_dense",
        "touched_gbps",
        "of_probe",
    ]
    print(*columns, sep="\t")
    for row in rows:
        found = asdict(row)
        print(*(found[name] for name in columns), sep="\t")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not {"cuda", "triton"} & set(available_backends()):
        sys.exit("no GPU backend runs here: a CUDA device and the extra gpu are needed")
    models = options.models.split(",")
    probe = read_bandwidth()
    tuned = tune_all(models, options) if options.tune else {}
    rows: list[Row] = []
    for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
        for model in models:
            for op in operations(model):
                if options.ops and op.name not in options.ops.split(","):
                    continue
                for tokens in map(int, options.tokens.split(",")):
                    rows += measure(model, op, dtype, tokens, options, probe)
    report = {
        "device": torch.cuda.get_device_name(),
        "kind": device_kind(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "read_bandwidth_gbps": probe / 1e9,
        "rows": [asdict(row) for row in rows],
        **tuned,
    }
    if options.json == "-":
        json.dump(report, sys.stdout, indent=1)
        print()
        return
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    show(rows, probe)


if __name__ == "__main__":
    main()
