"""vLLM 0.22."""

from __future__ import annotations

from wina.integrations.vllm.lines.runners import (
    Observe,
    attend_in_one_piece,
    watch_v1,
    watch_v2,
)

__all__ = ["attend_in_one_piece", "expert_class", "watch_runners"]


def watch_runners(observe: Observe) -> None:
    """Let the runners call ``observe``; the newer one serves where VLLM_USE_V2_MODEL_RUNNER=1."""
    from vllm.triton_utils import HAS_TRITON

    watch_v1(observe)
    if HAS_TRITON:  # which the module of the newer runner needs
        watch_v2(observe)


def expert_class() -> type:
    """Return the class of fused experts."""
    from vllm.model_executor.layers.fused_moe.layer import FusedMoE

    found: type = FusedMoE
    return found
