"""What a layer and a rank hold of a plan's vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wina.errors import WinaError
from wina.integrations.vllm.shards import check_layer, input_shard, missing, projections_of
from wina.plan import PlannedLinear

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def planned(*names: str, block: int = 0) -> dict[str, PlannedLinear]:
    return {
        name: PlannedLinear(
            kind=name.rpartition(".")[2], block=block, in_features=8, out_features=4, sparsity=0.5
        )
        for name in names
    }


def test_fused_layers_hold_each_projection() -> None:
    plan = planned("a.q_proj", "a.v_proj", "a.o_proj")
    assert projections_of("a.qkv_proj", plan, FUSED) == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert projections_of("a.o_proj", plan, FUSED) == ["a.o_proj"]
    assert projections_of("a.gate_up_proj", plan, FUSED) == []
    assert projections_of("b.qkv_proj", plan, FUSED) == []


def test_what_the_model_itself_fuses_is_one_linear() -> None:
    plan = planned("a.qkv_proj")
    assert projections_of("a.qkv_proj", plan, {"qkv_proj": ["qkv_proj"]}) == ["a.qkv_proj"]


def test_a_model_without_a_parent() -> None:
    assert projections_of("qkv_proj", planned("k_proj"), FUSED) == ["q_proj", "k_proj", "v_proj"]


def test_layers_that_do_not_fit() -> None:
    plan = planned("a.q_proj", "a.k_proj")
    check_layer(["a.q_proj", "a.k_proj"], plan, 8, 2)
    check_layer(["a.q_proj"], plan, 8, 3)
    with pytest.raises(WinaError, match="8 inputs, the model's has 16"):
        check_layer(["a.q_proj"], plan, 16, 1)
    with pytest.raises(WinaError, match="3 parts"):
        check_layer(["a.q_proj", "a.k_proj"], plan, 8, 3)


@given(st.integers(1, 6), st.integers(1, 9))
def test_ranks_share_the_inputs(ranks: int, held: int) -> None:
    vector = torch.arange(ranks * held, dtype=torch.float32)
    parts = [input_shard(vector, held, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), vector)


def test_uncut_inputs_are_whole_on_every_rank() -> None:
    vector = torch.arange(6.0)
    assert torch.equal(input_shard(vector, 6, 3), vector)


@given(st.integers(1, 4), st.integers(0, 1000))
def test_masks_do_not_depend_on_the_number_of_ranks(ranks: int, seed: int) -> None:
    torch.manual_seed(seed)
    held = 5
    x, vector = torch.randn(ranks * held), torch.rand(ranks * held)
    whole = x.abs() < vector
    parts = [
        part.abs() < input_shard(vector, held, rank) for rank, part in enumerate(x.split(held))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_missing_linears() -> None:
    plan = planned("0.q", "0.o") | planned("1.q", "1.o", block=1)
    assert missing({"0.q", "0.o"}, plan) == []  # block 1 is another rank's
    assert missing({"0.q", "0.o", "1.o"}, plan) == ["1.q"]
