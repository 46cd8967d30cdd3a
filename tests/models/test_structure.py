import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.helpers import make_model
from wina.errors import UsageError
from wina.models import blocks, find_sites

KINDS_OF = {
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["qkv_proj", "o_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize("kind", KINDS_OF)
def test_every_linear_of_every_block_is_found_in_order(kind: str) -> None:
    sites = find_sites(make_model(kind))
    assert [site.kind for site in sites] == KINDS_OF[kind] * 2
    assert [site.block for site in sites] == sorted(site.block or 0 for site in sites)
    assert len({site.name for site in sites}) == len(sites)


def test_shapes_are_in_then_out(model: PreTrainedModel) -> None:
    down = next(site for site in find_sites(model) if site.kind == "down_proj")
    assert (down.in_features, down.out_features, down.weights) == (48, 32, 48 * 32)


def test_the_head_comes_last_and_only_if_asked_for(each_model: PreTrainedModel) -> None:
    head = find_sites(each_model, include_head=True)[-1]
    assert (head.name, head.block, head.out_features) == ("lm_head", None, 320)
    assert all(site.block is not None for site in find_sites(each_model))


def test_the_longest_list_of_blocks_wins() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))  # no blocks
            self.towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))})
                for _ in range(3)
            )

    name, layers = blocks(Net())
    assert (name, len(layers)) == ("layers", 3)
    assert len(find_sites(Net())) == 27


def test_a_model_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="unsupported architecture Sequential"):
        blocks(nn.Sequential(nn.Linear(2, 2)))
    headless = nn.Module()
    headless.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(UsageError, match="no linear output head"):
        find_sites(headless, include_head=True)


def test_a_sparse_model_has_the_same_sites(model: PreTrainedModel) -> None:
    from tests.helpers import make_plan
    from wina.layers import sparsify

    before = find_sites(model)
    sparsify(model, make_plan(model, 0.5))
    assert find_sites(model) == before
    assert torch.is_tensor(model.get_submodule(before[0].name).weight)
