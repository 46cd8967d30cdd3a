from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import wina
from tests.helpers import make_plan, make_tokenizer, prompt
from wina.layers import widen, widened
from wina.measures import score_plan

Recorded = set[torch.dtype]


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor whose only products are of float32."""
    monkeypatch.setattr(widen, "multiplies", lambda dtype: dtype == torch.float32)
    widen._say.cache_clear()
    yield
    widen._say.cache_clear()


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def narrow(request: pytest.FixtureRequest, model: PreTrainedModel) -> PreTrainedModel:
    return model.to(request.param)


@pytest.fixture
def computed(narrow: PreTrainedModel) -> Recorded:
    """The dtypes in which the model's first linear sees texts, not single tokens."""
    seen: Recorded = set()

    def look(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > 8:
            seen.add(args[0].dtype)

    first = next(x for name, x in narrow.named_modules() if name.endswith("q_proj"))
    first.register_forward_pre_hook(look)
    return seen


def tensors(model: PreTrainedModel) -> dict[str, tuple[int, torch.Tensor]]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (x.data_ptr(), x.detach().clone()) for name, x in named}


def assert_in_place(model: PreTrainedModel, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    after = tensors(model)
    assert after.keys() == before.keys()
    for name, (place, value) in before.items():
        assert after[name][0] == place
        assert after[name][1].dtype == value.dtype
        assert torch.equal(after[name][1], value)


def test_weights_keep_their_values_and_come_back_to_their_places(
    narrow: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tensors(narrow)
    for _ in range(2):
        with widened(narrow), widened(narrow):
            assert {x.dtype for x in narrow.parameters()} == {torch.float32}
            for name, tensor in narrow.named_parameters():
                assert torch.equal(tensor, before[name][1].float())
        assert_in_place(narrow, before)
    with pytest.raises(RuntimeError), widened(narrow):
        raise RuntimeError
    assert_in_place(narrow, before)
    assert capsys.readouterr().err.count("computing in float32") == 1


def test_what_is_fast_or_does_not_fit_stays(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with widened(model):
        pass
    assert capsys.readouterr().err == ""
    model.to(torch.bfloat16)
    monkeypatch.setattr(widen, "_available", lambda: 1000.0)
    with widened(model):
        assert model.dtype == torch.bfloat16
    assert "GB of free memory" in capsys.readouterr().err


def test_calibrations_are_of_the_16_bit_weights_and_computed_in_float32(
    narrow: PreTrainedModel, computed: Recorded, text: Path
) -> None:
    before = tensors(narrow)
    made = wina.calibrate(narrow, make_tokenizer(), text, tokens=512, context=64)
    assert computed == {torch.float32}
    assert_in_place(narrow, before)
    assert made.document.model.dtype == str(narrow.dtype).removeprefix("torch.")
    computed.clear()
    plan = made.plan(0.5, refine=True, model=narrow)
    assert computed == {torch.float32}
    assert_in_place(narrow, before)
    wina.sparsify(narrow, plan)  # takes the plan for its own


def test_scores_are_those_of_the_same_weights_in_float32(
    narrow: PreTrainedModel, computed: Recorded
) -> None:
    plan, windows = make_plan(narrow, 0.5), [prompt(40)]
    totals, counter = score_plan(narrow, plan, windows, 4, "")
    assert computed == {torch.float32}
    wide, wide_counter = score_plan(narrow.float(), plan, windows, 4, "")
    assert totals == wide
    assert counter.sparsity == wide_counter.sparsity
