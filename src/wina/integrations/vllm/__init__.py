"""vLLM plugin: serve a model sparse, as the quantization method ``wina``.

vLLM calls ``register`` in each of its processes, through the entry point group
``vllm.general_plugins``. Nothing of vLLM is imported before. What differs between vLLM's versions
is in one module for each line of versions that is known (``lines``).
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the quantization method ``wina``; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from wina.integrations.vllm.config import METHOD, WinaConfig

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(WinaConfig)
