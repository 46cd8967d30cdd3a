"""What the lines share: following vLLM's two model runners."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Observe = Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], None]
_WATCHED = "_wina_watched"


def after(owner: type, method: str, then: Callable[..., None]) -> None:
    """Let a class's method call ``then(self, result, *arguments)`` at its end; once only."""
    original = getattr(owner, method)
    if getattr(original, _WATCHED, False):
        return

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        then(self, result, *args, **kwargs)
        return result

    setattr(watched, _WATCHED, True)
    setattr(owner, method, watched)


def attend_in_one_piece() -> None:
    """Let CPU attention sum over a request's whole context at once, unless the user chose.

    Otherwise how it is cut depends on what else is in the batch.
    """
    os.environ.setdefault("VLLM_CPU_ATTN_SPLIT_KV", "0")


def watch_v1(observe: Observe) -> None:
    """Follow ``GPUModelRunner`` of vllm.v1.worker, from which the CPU's derives."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def then(runner: Any, _result: Any, scheduled: Any, num_scheduled_tokens: NDArray[Any]) -> None:
        del scheduled
        batch, requests = runner.input_batch, len(num_scheduled_tokens)
        observe(
            batch.num_computed_tokens_cpu[:requests],
            num_scheduled_tokens,
            batch.num_prompt_tokens[:requests],
        )

    after(GPUModelRunner, "_prepare_inputs", then)


def watch_v2(observe: Observe) -> None:
    """Follow the newer runner, vllm.v1.worker.gpu."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def then(runner: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
        states, requests = runner.req_states, batch.idx_mapping_np
        observe(
            states.num_computed_tokens_np[requests],
            np.asarray(batch.num_scheduled_tokens),
            states.prompt_len.np[requests],
        )

    after(GPUModelRunner, "prepare_inputs", then)
