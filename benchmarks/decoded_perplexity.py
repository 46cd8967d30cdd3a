"""Perplexity of a plan as the kernels decode it, token by token, beside one masked pass.

The same windows three times: scored in one pass with masked inputs, as ``wina eval`` does; decoded
with the reference kernels; decoded with the device's own. A window's next token is given whatever
the model would have said.

    python benchmarks/decoded_perplexity.py --text wikitext2-test.txt
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from first_difference import SHIPPED
from wina.generation import Decoder
from wina.kernels import use_backend
from wina.layers import densify, lay_out_for_decode, sparsify
from wina.measures import Totals, compare, score_plan
from wina.models import load_model, start_ids
from wina.plan import Plan

ROWS = 4  # decoded together; each row's mask is its own


@torch.no_grad()
def decoded(model: PreTrainedModel, windows: list[Tensor], prefix: int, backend: str) -> Totals:
    """Return the totals of positions ``prefix`` and later, each token given."""
    totals = Totals()
    with use_backend(backend):
        for start in range(0, len(windows), ROWS):
            ids = torch.cat(windows[start : start + ROWS]).to(model.device)
            decoder = Decoder(model, ids.shape[1], batch=len(ids))
            decoder.prefill(ids[:, :prefix])
            for position in range(prefix, ids.shape[1] - 1):
                decoder.token.copy_(ids[:, position : position + 1])
                decoder.step()
                totals += compare(decoder.logits, ids[:, position + 1])
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plan", type=Path, default=SHIPPED)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=276)
    parser.add_argument("--prefix", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    loaded = load_model(options.model, dtype=options.dtype, device=options.device)
    model, plan = loaded.model, Plan.load(options.plan)
    start = start_ids(model, loaded.tokenizer)
    text = options.text.read_text(encoding="utf-8")
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    fresh = options.length - len(start)
    windows = [
        torch.tensor([start + ids[place * fresh : (place + 1) * fresh]])
        for place in range(options.windows)
    ]
    masked, counter = score_plan(model, plan, windows, options.prefix, "masked")
    print(f"{loaded.name}, {options.dtype} on {model.device}, torch {torch.__version__}")
    print(f"{masked.positions} positions, realized sparsity {counter.sparsity:.4f}")
    print(f"dense {masked.dense_perplexity:.4f}, one masked pass {masked.perplexity:.4f}")
    sparsify(model, plan)
    lay_out_for_decode(model)
    nll = masked.nll / masked.positions
    for backend in ("reference", "cpu" if model.device.type == "cpu" else "cuda"):
        found = decoded(model, windows, options.prefix, backend)
        other = found.nll / found.positions
        print(f"decoded by {backend}: {math.exp(other):.4f}, {other - nll:+.5f} nats a token")
    densify(model)


if __name__ == "__main__":
    main()
