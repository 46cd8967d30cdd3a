"""From what a user types to token ids."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.errors import UsageError
from wina.models import start_ids

Message = dict[str, str]


def encode_prompt(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, raw: bool = False
) -> list[int]:
    """Return the ids of a prompt, as a user's message where the model has a chat template.

    Args:
        model: decides about BOS where the tokenizer does not say.
        tokenizer: the model's.
        prompt: the text.
        raw: leave the chat template out.

    Raises:
        UsageError: nothing is left of the prompt.
    """
    if not raw and getattr(tokenizer, "chat_template", None):
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    text = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [*start_ids(model, tokenizer), *text]
    if not ids:
        raise UsageError("the prompt is empty")
    return ids


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation, ready for the assistant's turn."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
