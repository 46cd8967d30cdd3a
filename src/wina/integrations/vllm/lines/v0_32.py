"""vLLM 0.32."""

from __future__ import annotations

from wina.integrations.vllm.lines.runners import (
    Observe,
    attend_in_one_piece,
    watch_v1,
    watch_v2,
)

__all__ = ["attend_in_one_piece", "expert_class", "watch_runners"]


def watch_runners(observe: Observe) -> None:
    """Let the runners call ``observe``; the newer one is vLLM's default where Triton runs."""
    from vllm.triton_utils import HAS_TRITON

    watch_v1(observe)
    if HAS_TRITON:
        watch_v2(observe)


def expert_class() -> type:
    """Return the class of fused experts."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    found: type = RoutedExperts
    return found
