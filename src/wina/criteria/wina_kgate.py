"""WINA as the paper's own code runs it: column norms for k_proj and gate_proj only.

The code gives every other projection s_j = 1; where q, k, v or gate, up are one fused linear,
that linear gets norms.
"""

import torch
from torch import Tensor

from wina.criteria.base import Criterion, LinearFacts, register

KINDS_WITH_NORMS = {"k_proj", "gate_proj", "qkv_proj", "gate_up_proj"}


def column_norms_of_k_and_gate(facts: LinearFacts) -> Tensor:
    """s_j = ||W_:j||_2 for k and gate (or the fused projection that holds them), else 1."""
    if facts.kind in KINDS_WITH_NORMS:
        return facts.column_norm
    return torch.ones_like(facts.column_norm)


WINA_KGATE = register(Criterion("wina-kgate", column_norms_of_k_and_gate))
