"""Greedy text of the dense model and of plans, and where they part."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.api import densify, sparsify
from wina.generation import encode_prompt, generate
from wina.layers import lay_out_for_decode
from wina.models import LoadedModel
from wina.plan import Plan
from wina.progress import track
from wina.report.document import Sample, Text


def write_samples(
    loaded: LoadedModel, plans: Sequence[Plan], prompts: Sequence[str], tokens: int
) -> list[Sample]:
    """Let the dense model and each plan answer prompts, greedily.

    Args:
        loaded: the model, dense; dense again at the end.
        plans: in order.
        prompts: as a user types them.
        tokens: of an answer at most.
    """
    encoded = [encode_prompt(loaded.model, loaded.tokenizer, x) for x in prompts]
    answers = []
    each: list[tuple[int | None, Plan | None]] = [(None, None), *enumerate(plans)]
    for _, plan in track(each, "writing samples", len(each)):
        if plan is not None:
            sparsify(loaded.model, plan, check=False)
            lay_out_for_decode(loaded.model)
        try:
            answers.append([generate(loaded.model, ids, tokens).ids for ids in encoded])
        finally:
            densify(loaded.model)
    return [
        Sample(
            prompt=prompt,
            texts=[
                compare_texts(loaded.tokenizer, ids[number], answers[0][number], plan)
                for (plan, _), ids in zip(each, answers, strict=True)
            ],
        )
        for number, prompt in enumerate(prompts)
    ]


def compare_texts(
    tokenizer: Tokenizer, ids: Sequence[int], dense: Sequence[int], plan: int | None
) -> Text:
    """Return a text in three parts: as the dense one, the first token that differs, the rest.

    Args:
        tokenizer: the model's.
        ids: of the text.
        dense: of the dense model's.
        plan: whose text it is.
    """
    whole = _decode(tokenizer, ids)
    if list(ids) == list(dense):
        return Text(plan=plan, tokens=len(ids), same=None, start=whole)
    pairs = zip(ids, dense, strict=False)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if same is None:  # one ends where the other goes on
        same = min(len(ids), len(dense))
    # A token may end in the middle of a character; the text before it is then shorter.
    cuts = [0 if not n else _common(_decode(tokenizer, ids[:n]), whole) for n in (same, same + 1)]
    return Text(
        plan=plan,
        tokens=len(ids),
        same=same,
        start=whole[: cuts[0]],
        first=whole[cuts[0] : max(cuts)],
        rest=whole[max(cuts) :],
    )


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
