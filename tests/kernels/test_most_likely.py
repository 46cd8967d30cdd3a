"""The GPU's search for the most likely token; plain torch, so it runs anywhere."""

from __future__ import annotations

import pytest
import torch

from wina.kernels import reference


@pytest.mark.parametrize("vocabulary", [96, 97, 1024])
def test_it_is_argmax(vocabulary: int) -> None:
    """Equals and NaN included: the first one, in whichever part it lies; in parts or not."""
    torch.manual_seed(0)
    logits = torch.randn(6, vocabulary).bfloat16()
    logits[1] = 0.0
    logits[2, 40], logits[2, 70] = 9.0, 9.0
    logits[3, 95] = torch.inf
    logits[4, 50], logits[4, 51] = torch.nan, torch.nan
    logits[5] = -torch.inf
    assert torch.equal(reference.most_likely(logits), logits.argmax(-1))
