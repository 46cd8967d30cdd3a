"""How a fresh text starts: with the BOS token, for models that were trained with it.

Tokenizers do not always say. (For one Gemma GGUF, Transformers 5.17 builds a tokenizer that adds
no BOS and 5.23 one that does; without it the model's perplexity is six times higher.) So the
tokenizer is asked first and, if it adds nothing although there is a BOS token, the model.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.layers import widened

PROBE = (
    "The river rises in the hills to the north and flows south through the town, where it is "
    "crossed by three bridges. The oldest of them was built in 1782 and carries the main road. "
    "In winter the water is high, and the lower fields are often flooded for several weeks."
)
NATS = 0.25  # a model trained with BOS loses more than this a token without it


def start_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that start a fresh text.

    They are what the tokenizer adds, or BOS if that is far better by the model's own loss on a
    short text, or nothing.
    """
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    # What the tokenizer adds may follow the text too, or be part of its first token.
    places = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    added = full[: places[0]] if places else full[:1]
    if added or tokenizer.bos_token_id is None:
        return list(added)
    text = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    bos = [int(tokenizer.bos_token_id)]
    with widened(model):
        return bos if _loss(model, bos, text) < _loss(model, [], text) - NATS else []


@torch.no_grad()
def _loss(model: PreTrainedModel, start: list[int], text: list[int]) -> float:
    """Mean negative log likelihood in nats of all tokens of ``text`` but the first."""
    ids = torch.tensor([start + text], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(start) : -1].float()
    return float(functional.cross_entropy(logits, ids[0, len(start) + 1 :]))
