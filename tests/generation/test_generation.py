import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers import CONTEXT, TEMPLATE, make_plan, make_tokenizer, prompt
from wina.errors import UsageError
from wina.generation import Sampling, encode_chat, encode_prompt, generate
from wina.generation.sampling import draw
from wina.layers import phase_of, sparsify


@pytest.mark.parametrize("sparse", [False, True])
def test_greedy_tokens_are_those_of_transformers(each_model: PreTrainedModel, sparse: bool) -> None:
    if sparse:
        sparsify(each_model, make_plan(each_model, 0.4))
    ids = prompt(9)
    wanted = each_model.generate(ids, max_new_tokens=15, do_sample=False, pad_token_id=1)
    seen: list[int] = []
    found = generate(each_model, ids[0].tolist(), 15, on_token=seen.append)
    assert found.ids == seen == wanted[0, 9:].tolist()
    assert found.decoded == 14
    assert found.tokens_per_second > 0


def test_sparse_and_dense_text_differ(model: PreTrainedModel) -> None:
    ids = prompt(9)[0].tolist()
    dense = generate(model, ids, 20).ids
    sparsify(model, make_plan(model, 0.6))
    sparse = generate(model, ids, 20).ids
    assert sparse[0] == dense[0]  # the prompt's own last position is dense
    assert sparse != dense


def test_a_prompt_of_one_token_is_followed_by_sparse_ones(model: PreTrainedModel) -> None:
    dense = generate(model, [5], 20).ids
    sparsify(model, make_plan(model, 0.6))
    sparse = generate(model, [5], 20).ids
    assert sparse[0] == dense[0]
    assert sparse != dense
    phase = phase_of(model)
    assert phase is not None
    assert phase._forced is None


def test_an_end_token_ends_and_is_not_part_of_the_text(model: PreTrainedModel) -> None:
    ids = prompt(9)[0].tolist()
    whole = generate(model, ids, 10).ids
    place = next(i for i in range(2, 10) if whole[i] not in whole[:i])
    for ends in (whole[place], [1, whole[place]]):
        model.generation_config.eos_token_id = ends
        assert generate(model, ids, 10).ids == whole[:place]


def test_the_first_token_may_be_the_end(model: PreTrainedModel) -> None:
    ids = prompt(9)[0].tolist()
    model.generation_config.eos_token_id = generate(model, ids, 1).ids[0]
    found = generate(model, ids, 10)
    assert found.ids == []
    assert found.tokens_per_second == 0


def test_the_context_limits_the_text(model: PreTrainedModel) -> None:
    assert len(generate(model, [5] * (CONTEXT - 3), 99).ids) == 3
    with pytest.raises(UsageError, match=f"has {CONTEXT} tokens; the model's context is {CONTEXT}"):
        generate(model, [5] * CONTEXT, 1)


@pytest.mark.parametrize(("ids", "count"), [([], 1), ([5], 0), ([5], -1)])
def test_nothing_to_generate(model: PreTrainedModel, ids: list[int], count: int) -> None:
    with pytest.raises(UsageError, match=r"empty|at least 1"):
        generate(model, ids, count)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_sampling_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"temperature|top-p"):
        Sampling(**options)


def test_a_seed_fixes_the_draw(model: PreTrainedModel) -> None:
    ids = prompt(9)[0].tolist()
    one, same, other = (
        generate(model, ids, 20, Sampling(1.0, 0.9, seed)).ids for seed in (1, 1, 2)
    )
    assert one == same != other


def test_a_small_top_p_is_greedy(model: PreTrainedModel) -> None:
    ids = prompt(9)[0].tolist()
    assert generate(model, ids, 12, Sampling(1.0, 1e-6)).ids == generate(model, ids, 12).ids


def drawn(probabilities: list[float], sampling: Sampling) -> list[int]:
    logits = torch.log(torch.tensor(probabilities)).expand(4000, -1)
    return draw(logits, sampling, torch.Generator().manual_seed(0)).tolist()


def test_top_p_draws_only_from_the_nucleus_with_its_probabilities() -> None:
    found = drawn([0.1, 0.4, 0.3, 0.2], Sampling(1.0, 0.65))
    assert set(found) == {1, 2}  # 0.4 + 0.3 crosses 0.65
    assert found.count(1) / 4000 == pytest.approx(4 / 7, abs=0.03)


def test_temperature_sharpens() -> None:
    found = drawn([0.25, 0.75], Sampling(0.5))
    assert found.count(1) / 4000 == pytest.approx(0.9, abs=0.02)


def test_a_prompt_becomes_a_users_message_unless_raw(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer(template=True)
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.decode(encode_prompt(model, tokenizer, "hello"))
    assert text == "<s>user: hello\n<s>assistant: "
    assert tokenizer.decode(encode_prompt(model, tokenizer, "hello", raw=True)) == "hello"


def test_a_raw_prompt_starts_as_a_text_does(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer(bos=True)
    assert encode_prompt(model, tokenizer, "hello")[0] == 0
    assert encode_prompt(model, tokenizer, "") == [0]
    with pytest.raises(UsageError, match="prompt is empty"):
        encode_prompt(model, make_tokenizer(), "")


def test_a_conversation_is_not_given_bos_twice() -> None:
    tokenizer = make_tokenizer(bos=True, template=True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.decode(encode_chat(tokenizer, messages))
    assert text == "<s>user: a\n<s>assistant: b\n<s>assistant: "
