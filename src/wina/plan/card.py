"""The model card that a plan's folder carries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wina.plan.plan import PlanDocument


def model_card(document: PlanDocument, sparsity: float) -> str:
    """Return the card's Markdown, with the metadata header that the hub reads."""
    model = document.model
    realized = document.realized_sparsity
    measured = "not measured" if realized is None else f"{realized:.1%}"
    return f"""---
library_name: wina
base_model: {model.name}
tags: [activation-sparsity, wina]
---

# {model.name}, {document.target_sparsity:.0%} activation sparsity

A plan for [wina](https://pypi.org/project/wina/): for each linear layer, one vector of
thresholds. It holds no weights; the base model stays as it is.

| setting | value |
| --- | --- |
| method | {document.method} |
| allocation | {document.allocation} |
| selection | {document.selection} |
| target sparsity | {document.target_sparsity:.1%} |
| expected sparsity | {sparsity:.1%} |
| sparsity on held-out text | {measured} |
| prefill | {document.prefill} |
| linears | {len(document.linears)} |
| base model | {model.name} (revision {model.revision or "not recorded"}) |
| config hash | `{model.config_hash}` |
| weights hash | `{model.weights_hash}` |

```python
import wina
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{model.name}")
wina.sparsify(model, wina.Plan.load("this folder or its hub id"))
```
"""
