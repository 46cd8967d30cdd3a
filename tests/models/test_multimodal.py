import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import wina
from tests import families
from tests.helpers import make_plan
from wina.layers import SparseLayer
from wina.models import find_sites, load_model

GEMMA3, LLAVA = families.MULTIMODAL[:2]


@pytest.mark.parametrize("case", families.MULTIMODAL, ids=lambda case: case.name)
def test_only_the_language_model_is_sparsified(case: families.Case) -> None:
    model = families.make(case)
    sites = find_sites(model)
    assert len(sites) == 14
    assert all(".language_model.layers." in site.name for site in sites)
    wina.sparsify(model, make_plan(model, 0.5), check=False)
    sparse = {name for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    assert sparse == {site.name for site in sites}


@torch.no_grad()
def test_images_are_read_densely_and_answers_sparsely() -> None:
    model = families.make(GEMMA3)
    model.model.multi_modal_projector.mm_input_projection_weight.normal_()
    dense = copy.deepcopy(model)
    plan = make_plan(model, 0.4)
    wina.sparsify(model, plan, check=False)
    ids = torch.tensor([[5, *[families.IMAGE] * 4, 6, 7]])
    image = torch.rand(1, 3, 28, 28)
    kinds = (ids == families.IMAGE).long()
    given = {"pixel_values": image, "token_type_ids": kinds}
    prompt, wanted = (x(ids, **given, use_cache=True) for x in (model, dense))
    assert torch.equal(prompt.logits, wanted.logits)
    blank = model(ids, pixel_values=image * 0, token_type_ids=kinds)
    assert not torch.allclose(blank.logits[0, -1], wanted.logits[0, -1], atol=1e-3)
    for module_name, thresholds in plan.vectors.items():
        dense.get_submodule(module_name).register_forward_pre_hook(
            lambda _m, args, t=thresholds: (args[0] * (args[0].abs() >= t),)
        )
    token = torch.tensor([[8]])
    found = model(token, past_key_values=prompt.past_key_values).logits
    masked = dense(token, past_key_values=wanted.past_key_values).logits
    torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-5)
    generated = model.generate(ids, **given, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 10)


def test_a_wrapper_that_is_no_causal_model_is_loaded_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = families.make(LLAVA)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is type(model)
    ids = torch.tensor([[3, 4]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
