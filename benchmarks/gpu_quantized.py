"""Time the GPU kernel on quantized weights, launch by launch, over its configurations.

A layer's four launches (gate and up with the norm before, down and o with the residual after, q, k
and v with the norm), captured in CUDA graphs over as many sets of weights as exceed the cache four
times. Beside each, on the same shapes, stand torch's dense product of 4-bit weights (tinygemm), or
for 8 bits the product that inductor makes of torchao's weight, and the floor: the bytes of live
codes and of all scales at the speed of a plain read.

    python benchmarks/gpu_quantized.py --formats int4-g128,int8 --json sweep.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn import functional

from gpu_gemv import MODELS, read_bandwidth
from wina.bench.tinygemm import TinygemmLinear
from wina.kernels import QuantizedWeight, reference
from wina.kernels.cuda import quantized
from wina.kernels.cuda.compile import compiled, mapping
from wina.kernels.cuda.quantized import Config
from wina.kernels.cuda.tune import COMPILERS
from wina.kernels.quantized import dequantize
from wina.kernels.replay import CACHES, Replay, level_of
from wina.kernels.shapes import Shape, step_shapes

DEVICE = torch.device("cuda")
EPSILON = 1e-5
TOLERANCE = 0.02  # of the largest output
FORMATS = ("int4-g128", "int4-g128-symmetric", "int4-g32", "int8", "int8-g128")


class Trial:
    """One launch's tensors, and what is timed on them."""

    def __init__(self, shape: Shape, form: str, live: float) -> None:
        torch.manual_seed(0)
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self.shape, self.bits = shape, int(form[3])
        size = shape.weights * self.bits / 8
        self.copies = max(2, math.ceil(CACHES * cache / (size * live)))
        outputs = shape.outputs * 2 if shape.gated else shape.outputs
        self.weights = [
            [self._weight(shape.inputs, n, form) for n in outputs] for _ in range(self.copies)
        ]
        options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        self.x = torch.randn(self.copies, 1, shape.inputs, **options)
        self.norm = torch.ones(shape.inputs, **options) if shape.normed else None
        self.residual = torch.randn(1, outputs[0], **options) if shape.added else None
        self.thresholds = torch.zeros(shape.inputs, device=DEVICE)

    def _weight(self, inputs: int, outputs: int, form: str) -> QuantizedWeight:
        _, *rest = form.split("-")
        group = int(rest[0][1:]) if rest else inputs
        shape = (inputs // group, outputs)
        row = -(-outputs * self.bits // 512) * 64
        codes = torch.randint(0, 256, (inputs, row), device=DEVICE, dtype=torch.uint8)
        scales = (torch.rand(shape, device=DEVICE) + 0.5).mul_(inputs**-0.5 / 2**self.bits)
        points = self.bits == 4 and "symmetric" not in rest
        zeros = torch.randint(-8, 8, shape if points else (0,), device=DEVICE, dtype=torch.int8)
        codes = codes if self.bits == 4 else codes.view(torch.int8)
        return QuantizedWeight(codes, scales.bfloat16(), zeros)

    def drop(self, sparsity: float) -> None:
        self.thresholds.fill_(level_of(sparsity))

    def bytes(self, sparsity: float) -> float:
        return sum(w.code_bytes * (1 - sparsity) + w.scale_bytes for w in self.weights[0])

    def launch(self, config: Config, i: int) -> list[Tensor]:
        weights = self.weights[i]
        options: dict[str, Any] = {"norm": self.norm, "epsilon": EPSILON, "residual": self.residual}
        if self.shape.gated:
            options["activation"] = "silu"
        vectors = [self.thresholds] * len(weights)
        none = [None] * len(weights)
        return quantized.launch(self.x[i], weights, vectors, none, config, **options)

    def wanted(self) -> list[Tensor]:
        x = self.x[0]
        if self.norm is not None:
            x = reference.rms_norm(x, self.norm, EPSILON)
        x = reference.drop(x, self.thresholds).float()
        found = [x @ dequantize(w).t() for w in self.weights[0]]
        if self.shape.gated:
            return [functional.silu(found[0]) * found[1]]
        if self.residual is not None:
            found[0] = found[0] + self.residual
        return found

    def wrong(self, config: Config, wanted: list[Tensor]) -> str | None:
        found = self.launch(config, 0)
        for one, two in zip(found, wanted, strict=True):
            error = float((one.float() - two).abs().max() / two.abs().max())
            if not error < TOLERANCE:
                return f"is off by {error:.3g} of the largest"
        return None

    def dense(self) -> Replay:
        """Capture dense products alone, q, k, v side by side as one, gate and up as one."""
        joined = [
            QuantizedWeight(*(torch.cat(parts, -1) for parts in zip(*some, strict=True)))
            for some in self.weights
        ]
        if self.bits == 4:
            made = [TinygemmLinear(w) for w in joined]
            return Replay(lambda i: made[i](self.x[i]), self.copies)
        plain = [w.codes.t().contiguous() for w in joined]
        scales = [w.scales[0].contiguous() for w in joined]

        def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
            return torch.mm(x, codes.t().to(x.dtype)) * scale

        with inductor.patch(coordinate_descent_tuning=True):
            call = torch.compile(product, dynamic=False)
            return Replay(lambda i: call(self.x[i], plain[i], scales[i]), self.copies)


# threads of a block, blocks of a multiprocessor, rounds under way
STREAMS = (
    (256, 2, 4),
    (256, 2, 3),
    (256, 1, 4),
    (256, 3, 2),
    (384, 1, 4),
    (512, 1, 3),
    (128, 4, 4),
)


def cuts(trial: Trial, units: int) -> list[Config]:
    """Return ways to cut a launch into blocks."""
    shape = trial.shape
    pieces = [w.codes.shape[1] // 16 for w in trial.weights[0]]
    found = [quantized.config_for(shape.inputs, pieces, shape.gated, units)]
    for lanes, cluster, (threads, blocks, unroll) in itertools.product(
        quantized.LANES, (1, 2, 4, 8), STREAMS
    ):
        grid = cluster * sum(-(-n // lanes) for n in (pieces[:1] if shape.gated else pieces))
        if 0.8 * units <= grid * threads / 256 <= 3.4 * units:
            found.append(Config(lanes, threads // lanes, unroll, cluster, blocks))
    return [one for one in dict.fromkeys(found) if fits(trial, one)]


def fits(trial: Trial, config: Config) -> bool:
    segment = quantized.segment_of(trial.weights[0])
    assert segment is not None
    needed = quantized.shared_bytes(
        config, trial.shape.inputs, trial.shape.gated, segment, trial.bits
    )
    return needed * config.blocks <= 220 << 10


def build(trial: Trial, configs: list[Config]) -> list[Config]:
    """Compile configurations side by side; return those that compile."""
    shape, capability = trial.shape, torch.cuda.get_device_capability()

    def one(config: Config) -> Config | None:
        macros = quantized.macros_of(
            config, torch.bfloat16, trial.weights[0], gated=shape.gated, norm=shape.normed
        )
        try:
            compiled("quantized.cu", mapping(macros), capability)
            return config
        except Exception as error:
            print(f"  {config}: {str(error)[-200:]}", flush=True)
            return None

    with ThreadPoolExecutor(COMPILERS) as pool:
        return [one for one in pool.map(one, configs) if one is not None]


def sweep(
    trial: Trial, configs: list[Config], options: argparse.Namespace, until: float
) -> list[dict[str, Any]]:
    """Return configurations with their times, best first."""
    rows: list[dict[str, Any]] = []
    trial.drop(0.5)
    wanted = trial.wanted()
    for config in configs:
        if time.monotonic() > until:
            break
        try:
            trial.drop(0.5)
            wrong = trial.wrong(config, wanted)
            if wrong is not None:
                print(f"  {config} {wrong}", flush=True)
                continue
            replay, times = Replay(lambda i, c=config: trial.launch(c, i), trial.copies), {}
            for sparsity in options.sparsities:
                trial.drop(sparsity)
                times[sparsity] = round(replay.time(options.replays).p50, 2)
            rows.append({**asdict(config), "us": times})
        except Exception as error:
            print(f"  {config}: {str(error)[-200:]}", flush=True)
    return sorted(rows, key=lambda row: row["us"][options.judged])


alone = contextlib.nullcontext  # what other work on the device must wait for


def profile(shapes: dict[str, Shape], forms: list[str], sparsity: float) -> None:
    """Launch each once with the shipped configuration, between marks for a profiler."""
    units = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for form, (name, shape) in itertools.product(forms, shapes.items()):
        trial = Trial(shape, form, 1.0)
        trial.drop(sparsity)
        pieces = [w.codes.shape[1] // 16 for w in trial.weights[0]]
        config = quantized.config_for(shape.inputs, pieces, shape.gated, units)
        trial.launch(config, 0)
        torch.cuda.synchronize()
        print(f"{form} {name} {config}", flush=True)
        torch.cuda.cudart().cudaProfilerStart()
        trial.launch(config, 1)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b", choices=MODELS)
    parser.add_argument("--formats", default="int4-g128,int8", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--ops", default="gate-up,down,qkv,o")
    parser.add_argument("--sparsities", default="0,0.5,0.65")
    parser.add_argument("--judged", type=float, default=0.5, help="sparsity that decides")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--most", type=int, default=1000, help="configurations of a launch")
    parser.add_argument("--seconds", type=float, default=150.0, help="for all sweeps")
    parser.add_argument("--json", type=Path, help="all that was timed goes there as it comes")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    options.sparsities = [float(x) for x in options.sparsities.split(",")]
    every = dict(
        zip(("gate-up", "down", "qkv", "o"), step_shapes(*MODELS[options.model]), strict=True)
    )
    shapes = {name: every[name] for name in options.ops.split(",")}
    forms = options.formats.split(",")
    if options.profile:
        profile(shapes, forms, options.judged)
        return
    probe = read_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, plain read {probe / 1e9:.0f} GB/s", flush=True)
    print("format op what | us at " + " ".join(f"{x:.0%}" for x in options.sparsities), flush=True)
    begin, jobs = time.monotonic(), [(form, op) for form in forms for op in shapes]
    found: dict[str, Any] = {"device": name, "read_gbps": probe / 1e9, "launches": {}}
    units = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    trials = {job: Trial(shapes[job[1]], job[0], 1 - max(options.sparsities)) for job in jobs}
    configs = {
        job: build(trial, cuts(trial, units)[: options.most]) for job, trial in trials.items()
    }
    dense = {}
    for job, trial in trials.items():
        try:
            dense[job] = trial.dense()
        except Exception as error:
            print(f"  {job} dense: {str(error)[-300:]}", flush=True)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    with alone():
        for place, (job, trial) in enumerate(trials.items()):
            form, op = job
            left = begin + options.seconds - time.monotonic()
            until = time.monotonic() + left / (len(jobs) - place)
            floors = [trial.bytes(x) / probe * 1e6 for x in options.sparsities]
            print(form, op, "floor |", *(f"{x:.1f}" for x in floors), flush=True)
            floor = dense[job].time(options.replays).p50 if job in dense else math.nan
            print(form, op, f"dense | {floor:.2f}", flush=True)
            rows = sweep(trial, configs[job], options, until)
            for row in rows[:5]:
                told = " ".join(f"{k} {v}" for k, v in row.items() if k != "us")
                print(form, op, told, "|", *row["us"].values(), flush=True)
            print(f"  of {len(configs[job])} timed {len(rows)}", flush=True)
            found["launches"][f"{form} {op}"] = {"floor": floors, "dense": floor, "rows": rows}
            if options.json:
                options.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
