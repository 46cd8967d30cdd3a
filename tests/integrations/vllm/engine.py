"""Runs vLLM in a process of its own: reads one JSON request on stdin, writes one JSON reply.

vLLM keeps state for the life of a process, so each engine of a test gets a fresh one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "REPLY "
STAGGER = 7  # tokens
# Compiled in bfloat16 elsewhere; starts in a third of the time.
FLOAT32 = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
PAUSE = 1800  # seconds for one engine, compilation included, on cores that others use too


def environment(**more: str) -> dict[str, str]:
    """Return the environment of an engine on two shared CPU cores."""
    own = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # starts in half the time; the server has its own
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions to the workers, for `masks`
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    root = str(Path(__file__).parents[3])  # for the engine's own imports from here
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **own, **more}


@dataclass(frozen=True)
class Forced:
    """Prompts, and as many tokens that follow each."""

    prompts: list[list[int]]
    tokens: list[list[int]]


def generate(
    model: Path | str,
    prompts: list[list[int]],
    *,
    tokens: int = 64,
    batches: Sequence[int] = (),
    later: int | None = None,
    env: dict[str, str] | None = None,
    masks: bool = False,
    statistics: bool = False,
    forced: Sequence[Forced] = (),
    keep: str = "",
    broken: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return the greedy continuations of prompts (token ids) by an engine of its own.

    Args:
        model: folder.
        prompts: of token ids.
        tokens: to write after each prompt, less STAGGER times its length modulo 4: so that others
            start while some go on.
        batches: prompts given to the engine at once, in a round for each number; empty for one
            round with all of them.
        later: prompts of the rounds after the first; None for all.
        env: for the engine's processes.
        masks: return the channels that each layer keeps of a fixed input, too.
        statistics: return the number of preemptions, too.
        forced: rounds with forced tokens, after the others.
        keep: file for what the model said in each of these rounds (``forcing.said``), and for the
            inputs of its sparse layers in the last.
        broken: break the plan in one shard of one layer.
        options: of ``vllm.LLM``.
    """
    request = {
        "options": {"model": str(model), "max_model_len": 512, **options},
        "prompts": prompts,
        "tokens": tokens,
        "batches": list(batches) or [len(prompts)],
        "later": len(prompts) if later is None else later,
        "masks": masks,
        "statistics": statistics,
        "forced": [vars(one) for one in forced],
        "keep": keep,
        "broken": broken,
    }
    found = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=PAUSE,
        check=False,
        env=environment(**(env or {})),
    )
    replies = [line for line in found.stdout.splitlines() if line.startswith(MARK)]
    if not replies:
        raise RuntimeError(f"the engine ended with {found.returncode}:\n{found.stderr[-6000:]}")
    reply: dict[str, Any] = json.loads(replies[-1].removeprefix(MARK))
    return reply


def kept_channels(worker: Any) -> dict[str, list[Any]]:
    """Return, for each sparse layer of one rank, what it keeps of an input that all ranks share.

    For each projection: the indices, counted over all ranks' inputs.
    """
    import torch

    found = {}
    for name, layer in worker.get_model().named_modules():
        thresholds = getattr(layer, "thresholds", None)
        if thresholds is None:
            continue
        generator = torch.Generator().manual_seed(len(name))
        x = torch.randn(layer.input_size, generator=generator)
        held = thresholds.shape[1]
        first = 0 if held == layer.input_size else layer.tp_rank * held
        kept = ~(x[first : first + held].abs() < thresholds)
        found[name] = [(first + row.nonzero()[:, 0]).tolist() for row in kept]
    return found


def main() -> None:
    """Serve the request on stdin."""
    request = json.loads(sys.stdin.read())
    import torch
    from vllm import LLM, SamplingParams

    if request["forced"]:
        from tests.integrations.vllm import forcing

        request["options"] |= {"logits_processors": [forcing.Forcing], "async_scheduling": False}
    llm = LLM(seed=0, disable_log_stats=not request["statistics"], **request["options"])
    if request["broken"]:
        llm.collective_rpc(forcing.scale_one_shard)
    samplings = [
        SamplingParams(
            temperature=0, max_tokens=request["tokens"] - STAGGER * (len(ids) % 4), ignore_eos=True
        )
        for ids in request["prompts"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    rounds: list[list[list[int]]] = []
    for number, batch in enumerate(request["batches"] if prompts else ()):
        answers = []
        count = len(prompts) if number == 0 else request["later"]
        for start in range(0, count, batch):
            some = slice(start, min(start + batch, count))
            answers += llm.generate(prompts[some], samplings[some], use_tqdm=False)
        rounds.append([list(answer.outputs[0].token_ids) for answer in answers])
    reply: dict[str, Any] = {"tokens": rounds[0] if rounds else [], "rounds": rounds}
    if request["masks"]:
        reply["masks"] = llm.collective_rpc(kept_channels)
    if request["statistics"]:
        named = {metric.name: metric for metric in llm.get_metrics()}
        reply["preemptions"] = named["vllm:num_preemptions"].value
    if request["forced"]:
        kept: list[Any] = []
        inputs: list[Any] = []
        for number, one in enumerate(request["forced"], 1):
            if number == len(request["forced"]):
                inputs = forcing.keep_inputs()
            length = len(one["tokens"][0])
            samplings = [
                SamplingParams(
                    temperature=0,
                    max_tokens=length,
                    ignore_eos=True,
                    extra_args={"number": place, "forced": tokens},
                )
                for place, tokens in enumerate(one["tokens"])
            ]
            asked = [{"prompt_token_ids": ids} for ids in one["prompts"]]
            llm.generate(asked, samplings, use_tqdm=False)
            kept.append(forcing.said(len(asked), length))
        torch.save({"said": kept, "inputs": inputs}, request["keep"])
    print(MARK + json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
