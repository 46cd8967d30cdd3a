import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import wina
from tests.helpers import make_model, make_plan, prompt
from tests.layers.test_swap import assert_same, fingerprint
from wina.errors import WinaError
from wina.integrations import hf
from wina.layers import ChangedWeightsWarning, phase_of, sparse_layers
from wina.models import identify


def sparsified(model: PreTrainedModel, keep: float | None = None, **options: str) -> wina.Plan:
    plan = make_plan(
        model,
        lambda name, width: torch.rand(width, generator=torch.Generator().manual_seed(len(name))),
        keep=keep,
        identity=identify(model, "tiny"),
        **options,  # type: ignore[arg-type]
    )
    wina.sparsify(model, plan)
    return plan


def greedy(model: PreTrainedModel, ids: torch.Tensor, **options: object) -> list[list[int]]:
    found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1, **options)
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("keep", [None, 0.5])
def test_save_load_generate_gives_the_same_tokens(
    each_model: PreTrainedModel, keep: float | None, tmp_path: Path
) -> None:
    ids = prompt(10)
    dense = greedy(each_model, ids)
    plan = sparsified(each_model, keep)
    wanted = greedy(each_model, ids)
    assert wanted != dense
    each_model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(found) is type(each_model)
    assert greedy(found, ids) == wanted
    for name, layer in sparse_layers(found):
        assert torch.equal(layer.vector, plan.vectors[name])
    assert found.state_dict().keys() == each_model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_a_tuned_plan_are_saved_too(
    each_model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    plan = make_plan(each_model, 0.3, bias=True, prefill="sparse")
    without = make_plan(each_model, 0.3, prefill="sparse")
    each_model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wina.sparsify(model, without, check=False)
    plain = model(prompt()).logits
    wina.sparsify(model, plan, check=False)
    wanted = model(prompt()).logits
    assert not torch.allclose(wanted, plain, rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(found(prompt()).logits, wanted)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".sparse_bias"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WinaError, match=r"'\.sparse_bias' vectors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_fresh_process_needs_only_import_wina(tmp_path: Path) -> None:
    wanted = {}
    ids = prompt(10)
    for keep in (None, 0.5):
        model = make_model("mistral")
        sparsified(model, keep)
        model.save_pretrained(tmp_path / str(keep))
        wanted[str(keep)] = greedy(model, ids)
    script = f"""
import json, sys
import torch
import wina
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor({ids.tolist()})
found = {{}}
for name in ("None", "0.5"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/" + name)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
    found[name] = out[:, ids.shape[1]:].tolist()
print(json.dumps(found))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == wanted


def test_the_folder_keeps_names_and_adds_float32_vectors(
    each_model: PreTrainedModel, tmp_path: Path
) -> None:
    each_model.save_pretrained(tmp_path / "dense")
    plan = sparsified(each_model)
    each_model.save_pretrained(tmp_path / "sparse")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    sparse = load_file(tmp_path / "sparse" / "model.safetensors")
    assert sparse.keys() - dense.keys() == {f"{name}.thresholds" for name in plan.vectors}
    assert all(torch.equal(sparse[name], tensor) for name, tensor in dense.items())
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "wina"
    assert config["quantization_config"]["plan"]["method"] == "wina"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_narrow_weights_keep_float32_vectors(
    model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype, keep: float | None
) -> None:
    plan = sparsified(model, keep)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert found.model.layers[0].mlp.up_proj.weight.dtype == dtype
    for name, layer in sparse_layers(found):
        assert layer.vector.dtype == torch.float32
        assert torch.equal(layer.vector, plan.vectors[name])
    assert found(prompt(5)).logits.dtype == dtype


def test_a_loaded_model_can_be_made_dense_and_saved_again(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    ids = prompt()
    wanted = model(ids).logits
    sparsified(model, prefill="sparse")
    sparse = model(ids).logits
    model.save_pretrained(tmp_path / "one")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(found(ids).logits, sparse)
    found.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(again(ids).logits, found(ids).logits)
    wina.densify(again)
    assert torch.equal(again(ids).logits, wanted)
    again.save_pretrained(tmp_path / "three")
    assert "quantization_config" not in (tmp_path / "three" / "config.json").read_text()
    assert phase_of(AutoModelForCausalLM.from_pretrained(tmp_path / "three")) is None


def test_dequantize_makes_dense(model: PreTrainedModel, tmp_path: Path) -> None:
    wanted = model(prompt()).logits
    sparsified(model, prefill="sparse")
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    found.dequantize()
    assert phase_of(found) is None
    assert torch.equal(found(prompt()).logits, wanted)


def test_densify_leaves_no_trace(each_model: PreTrainedModel) -> None:
    before = fingerprint(each_model)
    sparsified(each_model)
    assert each_model.config.quantization_config.document.method == "wina"
    wina.densify(each_model)
    assert_same(fingerprint(each_model), before)


def test_registering_again_is_harmless(model: PreTrainedModel, tmp_path: Path) -> None:
    before = AUTO_QUANTIZER_MAPPING["wina"], AUTO_QUANTIZATION_CONFIG_MAPPING["wina"]
    hf.register()
    hf.register()
    assert (AUTO_QUANTIZER_MAPPING["wina"], AUTO_QUANTIZATION_CONFIG_MAPPING["wina"]) == before
    sparsified(model)
    model.save_pretrained(tmp_path)
    assert phase_of(AutoModelForCausalLM.from_pretrained(tmp_path)) is not None


@pytest.mark.parametrize("keep", [None, 0.5])
def test_static_and_dynamic_caches_agree(each_model: PreTrainedModel, keep: float | None) -> None:
    sparsified(each_model, keep)
    ids = prompt(10, batch=2)
    # A static cache may compile the step; eager is enough here.
    static = greedy(each_model, ids, cache_implementation="static", disable_compile=True)
    assert static == greedy(each_model, ids)


def test_a_batch_generates_what_its_rows_do(each_model: PreTrainedModel) -> None:
    sparsified(each_model)
    ids = prompt(10, batch=3)
    alone = [greedy(each_model, row[None])[0] for row in ids]
    assert greedy(each_model, ids) == alone


def damaged(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["plan"].update(schema_version=9), "schema version 9"),
        (lambda config: config["plan"].pop("method"), "method: Field required"),
        (lambda config: config["plan"]["linears"].update(x=1), "linears.x"),
        (
            lambda config: config["plan"]["linears"].update(
                x=config["plan"]["linears"]["model.layers.0.mlp.up_proj"]
            ),
            "no such layer",
        ),
    ],
)
def test_a_damaged_config_is_refused(
    model: PreTrainedModel,
    tmp_path: Path,
    change: Callable[[dict[str, object]], None],
    message: str,
) -> None:
    sparsified(model)
    model.save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(WinaError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_missing_vector_is_never_made_up(
    model: PreTrainedModel, tmp_path: Path, keep: float | None
) -> None:
    sparsified(model, keep)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.{'thresholds' if keep is None else 'scales'}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WinaError, match=r"holds 13 '\.(thresholds|scales)' vectors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_lora_adapter_trains_and_runs_on_top(model: PreTrainedModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sparsified(model, prefill="dense")
    wanted = greedy(model, prompt())
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=True)
    adapted = peft.get_peft_model(model, config)
    assert greedy(adapted, prompt()) == wanted  # an untrained adapter adds nothing
    ids = prompt(20)
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    assert gradients
    assert all("lora_" in name for name in gradients)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    changed = greedy(adapted, prompt())
    assert changed != wanted
    adapted.save_pretrained(tmp_path)
    base = make_model("qwen3")
    sparsified(base)
    assert greedy(peft.PeftModel.from_pretrained(base, tmp_path), prompt()) == changed


def test_a_loaded_plan_that_drops_nothing_is_the_dense_model(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    wanted = model(prompt()).logits
    for keep in (None, 1.0):
        plan = make_plan(model, 0.0 if keep is None else 1.0, keep=keep, prefill="sparse")
        wina.sparsify(model, plan, check=False)
        model.save_pretrained(tmp_path)
        found = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not any(layer.active for _, layer in sparse_layers(found))
        assert torch.equal(found(prompt()).logits, wanted)


def adapted_model(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_the_base_of_an_adapter_is_made_dense_under_it(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    twin = copy.deepcopy(model)
    sparsified(model, prefill="sparse")
    torch.manual_seed(0)
    adapted = adapted_model(model)
    torch.manual_seed(0)
    wanted = adapted_model(twin)(prompt()).logits
    assert not torch.allclose(adapted(prompt()).logits, wanted, atol=1e-3)
    assert wina.densify(adapted) is adapted
    assert torch.equal(adapted(prompt()).logits, wanted)
    assert not hasattr(model.config, "quantization_config")
    adapted.merge_and_unload().save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_a_model_in_adapters_is_refused(
    model: PreTrainedModel, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapted = adapted_model(model).eval()
    plan = make_plan(make_model("qwen3"), 0.5)
    with pytest.raises(wina.UsageError, match="wrapped by PEFT: merge"):
        wina.calibrate(adapted, tokenizer, text, tokens=768, context=128)
    with pytest.raises(wina.UsageError, match="wrapped by PEFT: merge"):
        wina.sparsify(adapted, plan, check=False)
    merged = adapted.merge_and_unload()
    assert phase_of(wina.sparsify(merged, plan, check=False)) is not None


def test_weights_changed_under_a_plan_are_noticed(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = prompt()
    plan = sparsified(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChangedWeightsWarning)
        for sparse in (model, loaded):
            sparse(ids)
            adapted = adapted_model(sparse)
            adapted(ids)
            greedy(adapted, ids)
            adapted.to(torch.bfloat16)(ids)  # a conversion is no change
            adapted.to(torch.float32)(ids)
    for sparse in (model, loaded):
        merged = adapted_model(sparse).merge_and_unload()
        with pytest.warns(ChangedWeightsWarning, match=r"4 sparse layers, such as .*calibrate"):
            merged(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ChangedWeightsWarning)
            merged(ids)  # said once
        merged.config.name_or_path = "tiny"
        with pytest.raises(WinaError, match="Calibrate the model as it is and plan again"):
            wina.sparsify(merged, plan)
