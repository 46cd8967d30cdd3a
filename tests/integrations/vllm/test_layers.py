"""vLLM's linear layers with a plan, in this process: loading, ranks, and what they compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.integrations.vllm.conftest import needs_vllm
from wina.errors import UsageError, WinaError
from wina.integrations.vllm.rows import BATCH
from wina.kernels import reference
from wina.plan import ModelIdentity, Plan, PlanDocument, PlannedLinear

pytestmark = needs_vllm
HIDDEN, HEADS, SHARED, SIZE, WIDE = 32, 4, 2, 8, 48
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SHAPES = {
    f"{ATTENTION}.q_proj": (HEADS * SIZE, HIDDEN),
    f"{ATTENTION}.k_proj": (SHARED * SIZE, HIDDEN),
    f"{ATTENTION}.v_proj": (SHARED * SIZE, HIDDEN),
    f"{ATTENTION}.o_proj": (HIDDEN, HEADS * SIZE),
    f"{MLP}.gate_proj": (WIDE, HIDDEN),
    f"{MLP}.up_proj": (WIDE, HIDDEN),
    f"{MLP}.down_proj": (HIDDEN, WIDE),
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PARTS = {
    f"{ATTENTION}.qkv_proj": dict(zip("qkv", FUSED["qkv_proj"], strict=True)),
    f"{ATTENTION}.o_proj": {None: "o_proj"},
    f"{MLP}.gate_up_proj": dict(enumerate(FUSED["gate_up_proj"])),
    f"{MLP}.down_proj": {None: "down_proj"},
}
ROWS = (True, False, True, True)


def tensors(kind: str, name: str) -> Tensor:
    """Return a linear's weight, bias, thresholds or sparse_bias, always the same."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind + name)))
    out, inputs = SHAPES[name]
    shape = {"weight": (out, inputs), "thresholds": (inputs,)}.get(kind, (out,))
    found = torch.randn(shape, generator=generator)
    return found.abs() if kind == "thresholds" else found


def make_plan(without: tuple[str, ...] = ()) -> Plan:
    """Return a plan with biases for all linears but some."""
    names = [name for name in SHAPES if not name.endswith(without or ("none",))]
    document = PlanDocument(
        model=ModelIdentity(name="m", config_hash="", weights_hash="", dtype="float32"),
        method="wina",
        allocation="uniform",
        selection="threshold",
        target_sparsity=0.5,
        linears={
            name: PlannedLinear(
                kind=name.rpartition(".")[2],
                block=0,
                in_features=SHAPES[name][1],
                out_features=SHAPES[name][0],
                sparsity=0.5,
                bias=True,
            )
            for name in names
        },
    )
    vectors = {name: tensors("thresholds", name) for name in names}
    return Plan(document, vectors, {name: tensors("sparse_bias", name) for name in names})


def build(config: Any, biased: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the layers of a block with their weights, as vLLM's models make and load them."""
    from vllm.model_executor.layers import linear

    config.packed_modules_mapping = FUSED
    options = {"quant_config": config, "params_dtype": dtype, "bias": biased}
    o, down = f"{ATTENTION}.o_proj", f"{MLP}.down_proj"
    qkv, gate_up = f"{ATTENTION}.qkv_proj", f"{MLP}.gate_up_proj"
    heads = (HIDDEN, SIZE, HEADS, SHARED)
    layers = {
        qkv: linear.QKVParallelLinear(*heads, prefix=qkv, **options),
        o: linear.RowParallelLinear(HEADS * SIZE, HIDDEN, prefix=o, **options),
        gate_up: linear.MergedColumnParallelLinear(HIDDEN, [WIDE] * 2, prefix=gate_up, **options),
        down: linear.RowParallelLinear(WIDE, HIDDEN, prefix=down, **options),
    }
    for name in layers:
        load(layers, name, "weight")
        if biased:
            load(layers, name, "bias")
    return layers


def load(layers: dict[str, Any], name: str, kind: str) -> None:
    """Load what a checkpoint holds of a layer through vLLM's loaders."""
    parameter = getattr(layers[name], kind)
    for shard, own in PARTS[name].items():
        found = tensors(kind, f"{name.rpartition('.')[0]}.{own}")
        parameter.weight_loader(parameter, found, *([] if shard is None else [shard]))


def finish(layers: dict[str, Any]) -> None:
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def run(layer: Any, x: Tensor, rows: tuple[bool, ...] = ROWS) -> Tensor:
    first = np.array([9 if row else 0 for row in rows])
    BATCH.start(first, np.ones_like(first), np.full_like(first, 9))
    return layer(x)[0]


def expected(name: str, x: Tensor, sparse: tuple[str, ...] = ("proj",)) -> Tensor:
    """Return what a layer should compute, its biases included."""
    found = []
    rows = torch.tensor(ROWS)[:, None]
    for own in PARTS[name].values():
        full = f"{name.rpartition('.')[0]}.{own}"
        weight, bias = tensors("weight", full), tensors("bias", full)
        dense = x @ weight.t() + bias
        masked = reference.drop(x, tensors("thresholds", full))
        other = masked @ weight.t() + bias + tensors("sparse_bias", full)
        found.append(torch.where(rows, other, dense) if full.endswith(sparse) else dense)
    return torch.cat(found, -1)


def inputs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    columns = {"o_proj": HEADS * SIZE, "down_proj": WIDE}.get(name.rpartition(".")[2], HIDDEN)
    return torch.randn(len(ROWS), columns, generator=generator)


@pytest.fixture
def beside(tmp_path: Path, vllm_config: Any) -> Any:
    from wina.integrations.vllm.config import WinaConfig

    make_plan().save(tmp_path / "plan")
    return WinaConfig.from_config({"quant_method": "wina", "plan": str(tmp_path / "plan")})


@pytest.mark.parametrize("name", PARTS)
def test_a_plan_beside_a_model(beside: Any, name: str) -> None:
    layers = build(beside)
    finish(layers)
    assert_close(run(layers[name], inputs(name)), expected(name, inputs(name)))


@pytest.mark.parametrize("name", PARTS)
def test_a_row_has_the_same_bits_in_any_batch(beside: Any, name: str) -> None:
    layers = build(beside)
    finish(layers)
    columns = inputs(name).shape[1]
    x = torch.randn(90, columns, generator=torch.Generator().manual_seed(2))
    rows = tuple(place % 2 == 0 for place in range(len(x)))
    together = run(layers[name], x, rows)
    for some in (1, 2, 3, 5, 17, 40):
        assert torch.equal(run(layers[name], x[:some], rows[:some]), together[:some])


def test_thresholds_stay_float32(beside: Any) -> None:
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
    try:
        layers = build(beside, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    finish(layers)
    for name, layer in layers.items():
        assert layer.thresholds.dtype == torch.float32
        own = next(iter(PARTS[name].values()))
        vector = tensors("thresholds", f"{name.rpartition('.')[0]}.{own}")
        assert torch.equal(layer.thresholds[0], vector)
        assert layer.sparse_bias.dtype == torch.bfloat16
    name = f"{MLP}.gate_up_proj"
    found = run(layers[name], inputs(name).bfloat16())
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("name", PARTS)
def test_vectors_in_the_checkpoint(vllm_config: Any, name: str) -> None:
    from wina.integrations.vllm.config import WinaConfig

    document = make_plan().document.model_dump(mode="json")
    layers = build(WinaConfig.from_config({"quant_method": "wina", "plan": document}))
    for each in PARTS:
        load(layers, each, "thresholds")
        load(layers, each, "sparse_bias")
    finish(layers)
    assert_close(run(layers[name], inputs(name)), expected(name, inputs(name)))


def test_a_checkpoint_that_lacks_vectors(vllm_config: Any) -> None:
    from wina.integrations.vllm.config import WinaConfig

    document = make_plan().document.model_dump(mode="json")
    layers = build(WinaConfig.from_config({"quant_method": "wina", "plan": document}))
    with pytest.raises(WinaError, match="lacks thresholds"):
        finish(layers)


def test_a_plan_of_some_projections(tmp_path: Path, vllm_config: Any) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from wina.integrations.vllm.config import WinaConfig

    without = ("k_proj", "gate_proj", "up_proj")
    make_plan(without).save(tmp_path / "plan")
    layers = build(WinaConfig.from_config({"plan": str(tmp_path / "plan")}))
    finish(layers)
    name = f"{ATTENTION}.qkv_proj"
    wanted = expected(name, inputs(name), sparse=("q_proj", "v_proj"))
    assert_close(run(layers[name], inputs(name)), wanted)
    name = f"{MLP}.gate_up_proj"
    assert type(layers[name].quant_method) is UnquantizedLinearMethod
    assert_close(run(layers[name], inputs(name)), expected(name, inputs(name), sparse=("none",)))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_add_up(beside: Any, ranks: Any, size: int) -> None:
    parts = []
    for rank in range(size):
        ranks(rank, size)
        parts.append(build(beside))
        finish(parts[-1])
    for name in (f"{ATTENTION}.o_proj", f"{MLP}.down_proj"):
        x = inputs(name)
        shards = x.chunk(size, -1)
        found = [run(layers[name], part) for layers, part in zip(parts, shards, strict=True)]
        assert_close(sum(found), expected(name, x))
        vectors = [layers[name].thresholds[0] for layers in parts]
        assert torch.equal(torch.cat(vectors), tensors("thresholds", name))
    name = f"{MLP}.gate_up_proj"
    found = [run(layers[name], inputs(name)).chunk(2, -1) for layers in parts]
    whole = torch.cat([torch.cat([part[i] for part in found], -1) for i in range(2)], -1)
    assert_close(whole, expected(name, inputs(name)))
    name = f"{ATTENTION}.qkv_proj"
    query, key = HEADS * SIZE // size, max(SHARED // size, 1) * SIZE
    found = [run(layers[name], inputs(name)).split([query, key, key], -1) for layers in parts]
    step = max(1, size // SHARED)  # ranks that hold one key head
    whole = [part[0] for part in found]
    whole += [part[i] for i in (1, 2) for part in found[::step]]
    assert_close(torch.cat(whole, -1), expected(name, inputs(name)))


def test_nothing_dropped_is_vllms_own_layer(tmp_path: Path, vllm_config: Any) -> None:
    from wina.integrations.vllm.config import WinaConfig

    plan = make_plan()
    linears = {x: y.model_copy(update={"bias": False}) for x, y in plan.document.linears.items()}
    document = plan.document.model_copy(update={"linears": linears})
    Plan(document, {x: torch.zeros_like(y) for x, y in plan.vectors.items()}).save(
        tmp_path / "plan"
    )
    layers = build(WinaConfig.from_config({"plan": str(tmp_path / "plan")}))
    dense = build_dense(layers)
    finish(layers)
    for name in PARTS:
        assert not layers[name].wina_active
        assert torch.equal(run(layers[name], inputs(name)), dense[name](inputs(name))[0])


def build_dense(like: dict[str, Any]) -> dict[str, Any]:
    """Return the same layers without a plan."""
    from wina.integrations.vllm.config import WinaConfig

    document = make_plan().document
    none = {"model.other": next(iter(document.linears.values()))}
    config = WinaConfig(document.model_copy(update={"linears": none}), None, None, "")
    layers = build(config)
    assert layers.keys() == like.keys()
    finish(layers)
    return layers


def test_a_packed_copy(beside: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from wina.integrations.vllm import packed

    monkeypatch.setattr(vllm_config, "additional_config", {"wina": {"dense_copy": True}})
    layers = build(beside)
    finish(layers)
    name = f"{ATTENTION}.qkv_proj"
    assert len(packed.products_of(layers[name].weight) or ()) == 3
    x = inputs(name).repeat(10, 1)
    found = run(layers[name], x, ROWS * 10)
    assert_close(found, expected(name, inputs(name)).repeat(10, 1), rtol=1e-4, atol=1e-4)
    packed._products.clear()


def test_what_is_compiled_is_the_plans(beside: Any, vllm_config: Any) -> None:
    before = vllm_config.compute_hash()
    build(beside)
    assert vllm_config.additional_config["wina_plan"] == beside.digest
    assert vllm_config.compute_hash() != before or "wina_plan" in str(before)


def test_a_linear_that_vllm_has_not(beside: Any) -> None:
    linear = next(iter(beside.planned.values()))
    beside.planned[f"{MLP}.extra_proj"] = linear
    layers = build(beside)
    with pytest.raises(WinaError, match=r"no layer for 1 of the plan's linears.*extra_proj"):
        finish(layers)


def test_experts_are_refused(beside: Any) -> None:
    import vllm

    from wina.integrations.vllm.lines import line_for

    experts = object.__new__(line_for(vllm.__version__).expert_class())
    assert beside.get_quant_method(experts, "model.layers.0.mlp.experts") is None
    beside.planned[f"{MLP}.experts.3.up_proj"] = next(iter(beside.planned.values()))
    with pytest.raises(UsageError, match="names experts"):
        beside.get_quant_method(experts, "model.layers.0.mlp.experts")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "wina needs a plan"),
        ({"plan": {"a": 1}}, "quantization_config.plan"),
        ({"plan": "no/such/plan/here"}, "there is no plan at"),
        (
            {"plan": make_plan().document.model_dump(), "base": {"quant_method": "gptq"}},
            "quantized by another method, gptq",
        ),
    ],
)
def test_configs_that_are_wrong(vllm_config: Any, config: Any, message: str) -> None:
    from wina.integrations.vllm.config import WinaConfig

    with pytest.raises(WinaError, match=message):
        WinaConfig.from_config(config)


def test_another_version(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from wina.integrations.vllm.config import WinaConfig

    monkeypatch.setattr(vllm, "__version__", "0.29.0")
    with pytest.raises(UsageError, match=r"this is vLLM 0\.29\.0"):
        WinaConfig.from_config({"plan": "any"})


def test_names_that_vllm_changes(beside: Any) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    beside.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert f"language_model.{ATTENTION}.q_proj" in beside.planned
    assert beside.names[f"language_model.{MLP}.up_proj"] == f"{MLP}.up_proj"


def test_registering_twice(vllm_config: Any) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    from wina.integrations.vllm import register
    from wina.integrations.vllm.config import WinaConfig

    register()
    register()
    assert get_quantization_config("wina") is WinaConfig


def test_vllm_finds_the_plugin() -> None:
    from importlib.metadata import entry_points

    found = [x for x in entry_points(group="vllm.general_plugins") if x.name == "wina"]
    assert importlib.util.find_spec("vllm") is not None
    assert found[0].value == "wina.integrations.vllm:register"
