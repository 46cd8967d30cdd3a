import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedModel

from tests.helpers import make_tokenizer
from wina.models import start_ids, tokens


def test_what_the_tokenizer_adds_is_how_a_text_starts(model: PreTrainedModel) -> None:
    assert start_ids(model, make_tokenizer(bos=True)) == [0]


def test_nothing_is_added_where_bos_does_not_help(model: PreTrainedModel) -> None:
    assert start_ids(model, make_tokenizer()) == []


def test_bos_is_added_where_the_model_needs_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {(): 5.0, (0,): 4.7}
    monkeypatch.setattr(tokens, "_loss", lambda _model, start, _text: losses[tuple(start)])
    assert start_ids(model, make_tokenizer()) == [0]
    losses[0,] = 4.8
    assert start_ids(model, make_tokenizer()) == []


def test_a_tokenizer_without_bos_has_no_start(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert start_ids(model, tokenizer) == []


@pytest.mark.parametrize(("template", "start"), [("$A </s>", []), ("<s> $A </s>", [0])])
def test_what_ends_a_text_does_not_start_it(
    model: PreTrainedModel, template: str, start: list[int]
) -> None:
    tokenizer = make_tokenizer()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        template, special_tokens=special
    )
    assert tokenizer("x")["input_ids"][-1] == 1
    assert start_ids(model, tokenizer) == start


def test_the_probes_loss_is_the_models_own(model: PreTrainedModel) -> None:
    text = make_tokenizer()(tokens.PROBE)["input_ids"]
    for start in ([], [0]):
        ids = torch.tensor([start + text])
        labels = ids.clone()
        labels[:, : len(start) + 1] = -100  # the text's first token is not scored
        wanted = model(ids, labels=labels).loss
        assert tokens._loss(model, start, text) == pytest.approx(wanted.item(), rel=1e-5)
