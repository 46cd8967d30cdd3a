"""vLLM's layers with a plan on weights of compressed-tensors, in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.integrations.compressed import integers, write
from tests.integrations.vllm.conftest import needs_vllm
from tests.integrations.vllm.test_layers import FUSED, PARTS, ROWS, finish, run
from wina.errors import UsageError, WinaError
from wina.integrations.vllm.rows import BATCH
from wina.kernels import reference
from wina.plan import ModelIdentity, Plan, PlanDocument, PlannedLinear

pytestmark = needs_vllm
HIDDEN, HEADS, SHARED, SIZE, WIDE = 128, 4, 2, 32, 192
CLOSE = {"rtol": 0.02, "atol": 0.06}  # in bfloat16, of outputs of size 3


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, the config's part on it, and the weights that the library makes of it."""

    held: dict[str, Tensor]
    config: dict[str, Any]
    weights: dict[str, Tensor]

    def of(self, kind: str, name: str) -> Tensor | None:
        if kind == "thresholds":
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            return torch.rand(self.weights[name].shape[1], generator=generator)
        if kind == "sparse_bias":
            generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1)
            return torch.randn(self.weights[name].shape[0], generator=generator)
        return self.held.get(f"{name}.{kind}")


def checkpoint(
    folder: Path, bits: int = 4, group: int | None = 32, symmetric: bool = True
) -> Checkpoint:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        initializer_range=0.2,
        attention_bias=True,
        mlp_bias=True,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    write(model, folder, integers(bits, group, symmetric))
    held = load_file(folder / "model.safetensors")
    model(torch.tensor([[1, 2]]))  # unpacks
    weights = {
        name.removesuffix(".weight"): weight.detach()
        for name, weight in model.named_parameters()
        if name.endswith("proj.weight")
    }
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    return Checkpoint(held, found, weights)


@pytest.fixture(scope="module", params=["symmetric", "points", "channel"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    options: dict[str, Any] = {"points": {"symmetric": False}, "channel": {"group": None}}
    return checkpoint(tmp_path_factory.mktemp("held"), **options.get(request.param, {}))


def make_plan(given: Checkpoint, without: tuple[str, ...] = ("none",)) -> Plan:
    """Return a plan with biases for all linears but some."""
    names = [name for name in given.weights if not name.endswith(without)]
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
                in_features=given.weights[name].shape[1],
                out_features=given.weights[name].shape[0],
                sparsity=0.5,
                bias=True,
            )
            for name in names
        },
    )
    vectors, biases = (
        {name: given.of(kind, name) for name in names} for kind in ("thresholds", "sparse_bias")
    )
    return Plan(document, vectors, biases)  # type: ignore[arg-type]


def config_for(given: Checkpoint, plan: Plan, folder: Path) -> Any:
    from wina.integrations.vllm.config import WinaConfig

    place = plan.save(folder / "plan")
    return WinaConfig.from_config({"plan": str(place), "base": given.config})


def build(config: Any, given: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return the layers of a block with their weights, as vLLM's models make and load them."""
    from vllm.model_executor.layers import linear

    config.packed_modules_mapping = FUSED
    options = {"quant_config": config, "params_dtype": dtype, "bias": True}
    qkv, o, gate_up, down = PARTS
    layers = {
        qkv: linear.QKVParallelLinear(HIDDEN, SIZE, HEADS, SHARED, prefix=qkv, **options),
        o: linear.RowParallelLinear(HEADS * SIZE, HIDDEN, prefix=o, **options),
        gate_up: linear.MergedColumnParallelLinear(HIDDEN, [WIDE] * 2, prefix=gate_up, **options),
        down: linear.RowParallelLinear(WIDE, HIDDEN, prefix=down, **options),
    }
    kinds = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias")
    for name in layers:
        for kind in kinds:
            load(layers, name, kind, given)
    return layers


def load(layers: dict[str, Any], name: str, kind: str, given: Checkpoint) -> None:
    parameter = getattr(layers[name], kind, None)
    for shard, own in PARTS[name].items():
        found = given.of(kind, f"{name.rpartition('.')[0]}.{own}")
        assert (parameter is None) == (found is None), kind
        if parameter is not None:
            parameter.weight_loader(parameter, found, *([] if shard is None else [shard]))


def inputs(name: str, rows: int = len(ROWS)) -> Tensor:
    columns = {"o_proj": HEADS * SIZE, "down_proj": WIDE}.get(name.rpartition(".")[2], HIDDEN)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


def expected(
    given: Checkpoint,
    name: str,
    x: Tensor,
    rows: tuple[bool, ...] = ROWS,
    sparse: tuple[str, ...] = ("proj",),
) -> Tensor:
    """Return what a layer should compute, its biases included."""
    found, x = [], x.float()
    for own in PARTS[name].values():
        full = f"{name.rpartition('.')[0]}.{own}"
        weight, bias = given.weights[full], given.held[f"{full}.bias"]
        vector, extra = given.of("thresholds", full), given.of("sparse_bias", full)
        assert vector is not None
        assert extra is not None
        dense = x @ weight.t() + bias
        other = reference.drop(x, vector) @ weight.t() + bias + extra
        which = torch.tensor(rows)[:, None]
        found.append(torch.where(which, other, dense) if full.endswith(sparse) else dense)
    return torch.cat(found, -1).bfloat16()


MIXES = {
    "one": (True,),
    "mixed": ROWS,
    "dense": (False,) * 3,
    "many": (True, False) * 12,
    "all": (True,) * 20,
}


@pytest.mark.parametrize("rows", MIXES)
@pytest.mark.parametrize("name", PARTS)
def test_each_row_by_itself(
    given: Checkpoint, vllm_config: Any, tmp_path: Path, name: str, rows: str
) -> None:
    layers = build(config_for(given, make_plan(given), tmp_path), given)
    finish(layers)
    x = inputs(name, len(MIXES[rows]))
    found = run(layers[name], x, MIXES[rows])
    assert_close(found, expected(given, name, x, MIXES[rows]), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_the_models_dtype(
    given: Checkpoint, vllm_config: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    config = config_for(given, make_plan(given), tmp_path)
    torch.set_default_dtype(dtype)  # as vLLM does while it builds a model
    try:
        layers = build(config, given, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    finish(layers)
    for name, layer in layers.items():
        assert layer.thresholds.dtype == torch.float32
        x = inputs(name).to(dtype)
        found = run(layer, x)
        assert found.dtype == dtype
        assert_close(found.bfloat16(), expected(given, name, x), **CLOSE)


def test_float32_is_refused_as_vllm_has_no_product(
    given: Checkpoint, vllm_config: Any, tmp_path: Path
) -> None:
    config = config_for(given, make_plan(given), tmp_path)
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        build(config, given, torch.float32)


@pytest.mark.parametrize("name", PARTS)
def test_a_row_has_the_same_bits_in_any_batch(
    given: Checkpoint,
    vllm_config: Any,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = build(config_for(given, make_plan(given), tmp_path), given)
    monkeypatch.setattr(BATCH, "exact", True)  # as the option batch_invariant has it
    finish(layers)
    x, rows = inputs(name, 40), (True, False) * 20
    together = run(layers[name], x, rows)
    for some in (1, 2, 3, 5, 17):
        assert torch.equal(run(layers[name], x[:some], rows[:some]), together[:some])


def test_vectors_in_the_checkpoint(given: Checkpoint, vllm_config: Any) -> None:
    from wina.integrations.vllm.config import WinaConfig

    document = make_plan(given).document.model_dump(mode="json")
    layers = build(WinaConfig.from_config({"plan": document, "base": given.config}), given)
    with pytest.raises(WinaError, match="lacks thresholds"):
        finish(layers)
    for name in PARTS:
        load(layers, name, "thresholds", given)
        load(layers, name, "sparse_bias", given)
    finish(layers)
    for name in PARTS:
        x = inputs(name)
        assert_close(run(layers[name], x), expected(given, name, x), **CLOSE)


def test_a_bias_that_vllms_kernel_reorders(
    given: Checkpoint, vllm_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Marlin's does, for itself."""
    layers = build(config_for(given, make_plan(given), tmp_path), given)

    def reordering(process: Any) -> Any:
        def processed(layer: Any) -> None:
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.flip(0)
            process(layer)

        return processed

    for layer in layers.values():
        own = reordering(layer.scheme.process_weights_after_loading)
        monkeypatch.setattr(layer.scheme, "process_weights_after_loading", own)
    finish(layers)
    for name, layer in layers.items():
        assert_close(run(layer, inputs(name)), expected(given, name, inputs(name)), **CLOSE)


def test_a_plan_of_some_projections(given: Checkpoint, vllm_config: Any, tmp_path: Path) -> None:
    plan = make_plan(given, ("k_proj", "gate_proj", "up_proj"))
    layers = build(config_for(given, plan, tmp_path), given)
    finish(layers)
    qkv, _, gate_up, _ = PARTS
    wanted = expected(given, qkv, inputs(qkv), sparse=("q_proj", "v_proj"))
    assert_close(run(layers[qkv], inputs(qkv)), wanted, **CLOSE)
    method = type(layers[gate_up].quant_method)
    assert method.__name__ == "CompressedTensorsLinearMethod"
    wanted = expected(given, gate_up, inputs(gate_up), sparse=("none",))
    assert_close(run(layers[gate_up], inputs(gate_up)), wanted, **CLOSE)


def test_layers_that_the_base_leaves_as_they_are(
    given: Checkpoint, vllm_config: Any, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    config = config_for(given, make_plan(given), tmp_path)
    config.packed_modules_mapping = FUSED
    down = list(PARTS)[-1]
    config.base.ignore.append(down)
    layer = RowParallelLinear(WIDE, HIDDEN, prefix=down, quant_config=config, bias=True)
    assert type(layer.quant_method).__name__ == "WinaLinearMethod"
    assert layer.weight.shape == (HIDDEN, WIDE)


@pytest.mark.parametrize("size", [2])
def test_ranks_add_up(
    given: Checkpoint, vllm_config: Any, ranks: Any, tmp_path: Path, size: int
) -> None:
    parts = []
    for rank in range(size):
        ranks(rank, size)
        parts.append(build(config_for(given, make_plan(given), tmp_path / str(rank)), given))
        finish(parts[-1])
    qkv, o, gate_up, down = PARTS
    for name in (o, down):
        x = inputs(name)
        shards = x.chunk(size, -1)
        found = [run(layers[name], part) for layers, part in zip(parts, shards, strict=True)]
        assert_close(sum(found), expected(given, name, x), rtol=0.03, atol=0.1)
    found = [run(layers[gate_up], inputs(gate_up)).chunk(2, -1) for layers in parts]
    whole = torch.cat([torch.cat([part[i] for part in found], -1) for i in range(2)], -1)
    assert_close(whole, expected(given, gate_up, inputs(gate_up)), **CLOSE)
    query, key = HEADS * SIZE // size, SHARED * SIZE // size
    found = [run(layers[qkv], inputs(qkv)).split([query, key, key], -1) for layers in parts]
    whole = torch.cat([part[i] for i in range(3) for part in found], -1)
    assert_close(whole, expected(given, qkv, inputs(qkv)), **CLOSE)


def test_nothing_dropped_is_vllms_own_layer(
    given: Checkpoint, vllm_config: Any, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    plan = make_plan(given)
    linears = {x: y.model_copy(update={"bias": False}) for x, y in plan.document.linears.items()}
    document = plan.document.model_copy(update={"linears": linears})
    nothing = Plan(document, {x: torch.zeros_like(y) for x, y in plan.vectors.items()})
    layers = build(config_for(given, nothing, tmp_path), given)
    own = build(compressed_tensors.CompressedTensorsConfig.from_config(given.config), given)
    for each in (layers, own):
        finish(each)
    for name in PARTS:
        assert not layers[name].wina_active
        assert torch.equal(run(layers[name], inputs(name)), own[name](inputs(name))[0])


def test_the_plan_and_the_base_are_what_is_compiled(
    given: Checkpoint, vllm_config: Any, tmp_path: Path
) -> None:
    config = config_for(given, make_plan(given), tmp_path)
    other = {**given.config, "ignore": ["lm_head", "model.layers.0.mlp.down_proj"]}
    again = config_for(Checkpoint({}, other, given.weights), make_plan(given), tmp_path / "again")
    assert config.digest != again.digest


@pytest.mark.parametrize("kind", ["W8A8", "W2A16"])
def test_formats_that_are_refused(kind: str, vllm_config: Any, tmp_path: Path) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from vllm.model_executor.layers.linear import RowParallelLinear

    made = checkpoint(tmp_path / "held")
    bits, form = (8, "int-quantized") if kind == "W8A8" else (2, "pack-quantized")
    scheme = preset_name_to_scheme("W8A8", ["Linear"]) if bits == 8 else integers(bits, 32)
    group = json.loads(scheme.model_dump_json())
    config = {**made.config, "format": form, "config_groups": {"all": {**group, "format": form}}}
    found = config_for(Checkpoint({}, config, made.weights), make_plan(made), tmp_path)
    with pytest.raises(UsageError, match="codes of 4 or 8 bits"):
        RowParallelLinear(WIDE, HIDDEN, prefix=list(PARTS)[-1], quant_config=found)


def test_what_a_graph_on_a_gpu_computes(
    given: Checkpoint, vllm_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that looks up the rows on the device, here with vLLM's product on a CPU."""
    from wina.integrations.vllm import quantized

    layers = build(config_for(given, make_plan(given), tmp_path), given)
    finish(layers)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(BATCH, "_on_device", {})
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    BATCH.prepare(torch.device("cpu"))
    for name, layer in layers.items():
        for rows in MIXES.values():
            x = inputs(name, len(rows))
            run(layer, x, rows)
            each = (layer.thresholds, layer.wina_sizes, [layer.bias], [layer.sparse_bias])
            found = quantized._on_cuda(x, *each)
            assert_close(found, expected(given, name, x, rows), **CLOSE)


def test_opaque_to_compile(given: Checkpoint, vllm_config: Any, tmp_path: Path) -> None:
    layers = build(config_for(given, make_plan(given), tmp_path), given)
    finish(layers)
    layer = layers[next(iter(PARTS))]
    compiled = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True, backend="aot_eager")
    x = inputs(next(iter(PARTS)))
    for rows in ((True,) * 4, (False, True, False, True)):
        wanted = run(layer, x, rows) * 2
        assert torch.equal(compiled(x), wanted)


def test_thresholds_that_moved_are_seen(
    given: Checkpoint, vllm_config: Any, tmp_path: Path
) -> None:
    layers = build(config_for(given, make_plan(given), tmp_path), given)
    finish(layers)
    layer = layers[next(iter(PARTS))]
    layer.thresholds.data = layer.thresholds.data.clone()
    with pytest.raises(WinaError, match="offloading"):
        run(layer, inputs(next(iter(PARTS))))
