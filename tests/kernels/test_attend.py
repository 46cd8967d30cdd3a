"""Rotary embedding and the cache's write taken into attention, in a traced step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.families import SHAPE
from tests.helpers import make_plan, prompt
from torch.fx import GraphModule
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import wina
from wina.generation import Decoder, decoder
from wina.kernels.attend import attend
from wina.kernels.fusion import fuse


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operator stands in the graphs that are compiled: as on a GPU, on a CPU."""
    found: Counter[str] = Counter()

    def rewrite(graph: GraphModule) -> GraphModule:
        attend(fuse(graph), lambda *_: True)
        graph.graph.lint()
        graph.recompile()
        found.update(str(getattr(x.target, "__name__", x.target)) for x in graph.graph.nodes)
        return graph

    monkeypatch.setattr(decoder, "fuse", rewrite)
    return found


def logits(model: PreTrainedModel, mode: str, batch: int) -> torch.Tensor:
    made = Decoder(model, 30, batch=batch, mode=mode)
    found = []
    for seed, length in ((0, 9), (1, 4)):  # the second prompt finds the first one's leavings
        made.prefill(prompt(length, batch=batch, seed=seed))
        for _ in range(5):
            made.step()
            found.append(made.logits.float().clone())
    assert made.mode == mode
    return torch.stack(found)


FAMILIES = [
    ("llama", {}, 1),
    ("llama", {}, 3),
    ("mistral", {"sliding_window": 6}, 1),
    ("qwen2", {}, 1),
    ("qwen3", {"head_dim": 8}, 2),
    ("phi3", {}, 1),
    (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        1,
    ),
]


def make(family: str, more: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **more))
    return model.float().eval()


@pytest.mark.parametrize(("family", "more", "batch"), FAMILIES, ids=str)
def test_each_layers_attention_is_one_operator(
    seen: Counter[str], family: str, more: dict[str, Any], batch: int
) -> None:
    model = make(family, more)
    wina.sparsify(model, make_plan(model, 0.4), check=False)
    found = logits(model, "compiled", batch)
    assert seen["attention_step"] == model.config.num_hidden_layers
    left = ("index_copy_", "add_", "decode_attention", "neg")
    assert not any(seen[name] for name in left)
    assert seen["_foreach_add_"] == 1
    wanted = logits(model, "eager", batch)
    assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.std()))


def test_a_dense_model_too(seen: Counter[str]) -> None:
    model = make("llama", {})
    assert_close(logits(model, "compiled", 1), logits(model, "eager", 1))
    assert seen["attention_step"] == 2


def test_other_rotations_stay(seen: Counter[str]) -> None:
    model = make("glm", {"head_dim": 8})  # pairs of neighbours
    assert_close(logits(model, "compiled", 1), logits(model, "eager", 1))
    assert seen["attention_step"] == 0
    assert seen["decode_attention"] == 2


@pytest.mark.parametrize("count", [1, 3])
def test_opcheck(count: int) -> None:
    query, key, value = (torch.randn(2, heads, 1, 8) for heads in (2 * count, 2, 2))
    turn = torch.randn(1, 1, 8)
    cache = [torch.randn(2, 2, 9, 8) for _ in range(2)]
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    arguments = (query, key, value, turn, turn, *cache, torch.tensor(5), mask, 0.5)
    torch.library.opcheck(torch.ops.wina.attention_step.default, arguments)
