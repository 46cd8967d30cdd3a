"""What this processor multiplies well."""

from __future__ import annotations

import torch


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether torch multiplies matrices of a dtype on this processor at a good speed."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known = torch.ops.mkldnn
    brain = dtype == torch.bfloat16
    return bool(known._is_mkldnn_bf16_supported() if brain else known._is_mkldnn_fp16_supported())
