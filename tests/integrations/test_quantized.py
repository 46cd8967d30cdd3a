"""Models quantized by other libraries, by the libraries themselves: the whole way for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)

import wina
from tests.conformance import continue_text, decode, masked
from tests.helpers import CONTEXT, VOCABULARY, make_plan, prompt
from tests.integrations import compressed
from wina.evaluation import evaluate
from wina.generation import generate
from wina.layers import MaskedLayer, lay_out_for_decode, sparse_layers
from wina.layers import quantized as codes
from wina.models.quantize import Scheme, quantize

GROUP = 32


def plain() -> PreTrainedModel:
    """A model whose rows are whole blocks and groups of every format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def quantized(folder: Path, config: Any, **options: Any) -> PreTrainedModel:
    """Let Transformers quantize as it loads."""
    plain().save_pretrained(folder)
    options = {"dtype": torch.float32, "quantization_config": config, **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def torchao(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    api = pytest.importorskip("torchao.quantization")
    return quantized(folder, TorchAoConfig(getattr(api, name)(**options)))


def bitsandbytes(folder: Path, **options: Any) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    return quantized(folder, BitsAndBytesConfig(**options), device_map="cpu")


def compressed_tensors(folder: Path, scheme: str, form: str) -> PreTrainedModel:
    """Round to nearest, as llm-compressor stores it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import preset_name_to_scheme

    group = preset_name_to_scheme(scheme, ["Linear"])
    if group.weights.group_size:
        group.weights.group_size = GROUP
    compressed.write(plain(), folder, group, form)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
    """Write a checkpoint, the tied head left out."""
    model = plain().half() if config else plain()
    model.config.save_pretrained(folder)
    kept = {
        name: x.clone(memory_format=torch.contiguous_format)
        for name, x in tensors.items()
        if name != "lm_head.weight"
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def gptqmodel(folder: Path, method: str) -> PreTrainedModel:
    """Round to nearest in groups, in the layout of GPTQ or AWQ checkpoints."""
    pytest.importorskip("gptqmodel")
    if method == "gptq":
        pytest.importorskip("optimum")
    model = plain()
    tensors = {name: x.half() for name, x in model.state_dict().items()}
    order = range(8) if method == "gptq" else (0, 2, 4, 6, 1, 3, 5, 7)
    for name, module in linears(model):
        groups = module.weight.detach().unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(-1) / 7
        codes = ((groups / scales[..., None]).round() + 8).clamp(0, 15).flatten(1).T.int()
        zeros = torch.full_like(scales.T, 8, dtype=torch.int32)
        del tensors[f"{name}.weight"]
        if method == "gptq":
            tensors[f"{name}.qweight"] = packed(codes.T, order).T.contiguous()
            tensors[f"{name}.qzeros"] = packed(zeros - 1, order)
            tensors[f"{name}.g_idx"] = torch.arange(codes.shape[0], dtype=torch.int32) // GROUP
        else:
            tensors[f"{name}.qweight"] = packed(codes, order)
            tensors[f"{name}.qzeros"] = packed(zeros, order)
        tensors[f"{name}.scales"] = scales.T.contiguous().half()
    config: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    if method == "gptq":
        config |= {"sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    else:
        config |= {"zero_point": True, "version": "gemm"}
    write(folder, tensors, config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


def packed(codes: Tensor, order: Any) -> Tensor:
    """Return eight codes of a row in each int32, the first in the lowest bits."""
    eights = codes.unflatten(1, (-1, 8))
    words = sum((eights[..., place].long() << (4 * i)) for i, place in enumerate(order))
    return (words - ((words >> 31) << 32)).to(torch.int32)


@dataclass(frozen=True)
class Kind:
    name: str
    make: Callable[[Path], PreTrainedModel]
    saved: bool = True
    rounds_activations: bool = False
    codes: bool = True  # of 8 or 4 bits, with scales: wina's kernels read them


KINDS = (
    Kind("torchao int8", partial(torchao, name="Int8WeightOnlyConfig")),
    Kind(
        "torchao int8 dynamic",
        partial(torchao, name="Int8DynamicActivationInt8WeightConfig"),
        rounds_activations=True,
        codes=False,
    ),
    Kind("torchao int4", partial(torchao, name="IntxWeightOnlyConfig", weight_dtype=torch.int4)),
    Kind("torchao float8", partial(torchao, name="Float8WeightOnlyConfig"), codes=False),
    Kind("bitsandbytes 8 bit", partial(bitsandbytes, load_in_8bit=True), codes=False),
    Kind(
        "bitsandbytes nf4",
        partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        saved=False,
        codes=False,
    ),
    Kind("W4A16", partial(compressed_tensors, scheme="W4A16", form="pack-quantized")),
    Kind("W8A16", partial(compressed_tensors, scheme="W8A16", form="pack-quantized")),
    Kind(
        "W8A8",
        partial(compressed_tensors, scheme="W8A8", form="int-quantized"),
        rounds_activations=True,
        codes=False,
    ),
    Kind(
        "FP8 dynamic",
        partial(compressed_tensors, scheme="FP8_DYNAMIC", form="float-quantized"),
        rounds_activations=True,
        codes=False,
    ),
    Kind("GPTQ", partial(gptqmodel, method="gptq"), saved=False),
    Kind("AWQ", partial(gptqmodel, method="awq")),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@torch.no_grad()
def test_the_whole_way(
    kind: Kind, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    model, untouched = kind.make(tmp_path / "one").eval(), kind.make(tmp_path / "two").eval()
    ids = prompt(10)
    dense = model(ids).logits
    quantizer = model.hf_quantizer
    settings = {"tokens": 768, "context": 128, "dense_prefix": 4, "verdict": False}
    calibration = wina.calibrate(model, tokenizer, text, **settings)
    assert all(x.gradient_rms.max() > 0 for x in calibration.statistics)
    plan = calibration.plan(0.5, "loss", "global", model=model, refine=True)
    assert plan.document.realized_sparsity == pytest.approx(0.5, abs=0.02)
    plan.save(tmp_path / "plan")
    plan = wina.Plan.load(tmp_path / "plan")

    wina.sparsify(model, plan)
    layers = dict(sparse_layers(model))
    assert len(layers) == 14
    assert all(isinstance(layer, MaskedLayer) for layer in layers.values())
    assert torch.equal(model(ids).logits, dense)
    assert torch.equal(untouched(ids).logits, dense)
    with masked(untouched, plan) as decoding:
        wanted = decode(untouched, ids, decoding)
    # Where activations are rounded, a difference of the last bit may be one of a whole step.
    coarse = kind.rounds_activations or dense.dtype != torch.float32
    close = {"rtol": 1e-3, "atol": 0.1 if coarse else 1e-3}
    torch.testing.assert_close(decode(model, ids), wanted, **close)
    assert (wanted - decode(untouched, ids)).abs().max() > 0.5
    tokens = wanted.argmax(-1).tolist()
    assert continue_text(model, ids) == tokens
    lay_out_for_decode(model)
    assert [codes.packed(layer) is not None for layer in layers.values()] == [kind.codes] * 14
    assert torch.equal(model(ids).logits, dense)
    torch.testing.assert_close(decode(model, ids), wanted, **close)
    if not kind.rounds_activations:
        assert generate(model, ids[0].tolist(), len(tokens)).ids == tokens

    if kind.saved:
        model.save_pretrained(tmp_path / "sparse")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
        assert dict(sparse_layers(loaded)).keys() == layers.keys()
        torch.testing.assert_close(decode(loaded, ids), wanted, **close)
        wina.densify(loaded)
        assert torch.equal(loaded(ids).logits, dense)
        # Some Transformers dequantize what compressed-tensors had unpacked when it was saved.
        assert type(getattr(loaded, "hf_quantizer", quantizer)) is type(quantizer)
    else:
        with pytest.raises(wina.UsageError, match=r"plan's own folder \(plan.save\)"):
            model.save_pretrained(tmp_path / "sparse")
    wina.densify(model)
    assert torch.equal(model(ids).logits, dense)
    assert [*map(type, model.modules())] == [*map(type, untouched.modules())]
    assert model.hf_quantizer is quantizer
    assert model.config.quantization_config is quantizer.quantization_config
    scored = {"name": "x", "tokens": 256, "context": 128, "dense_prefix": 4}
    result = evaluate(model, tokenizer, [plan], [text], **scored).results[0]
    assert result.sparsity == pytest.approx(0.5, abs=0.05)
    assert 0 < result.kl < 1


@torch.no_grad()
def test_the_linears_of_fp8_checkpoints_are_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernel needs a GPU: here plain torch stands in for it."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "_dequantize_fp8_weight") or not hasattr(fp8, "fp8_linear"):
        pytest.skip("another Transformers")

    def stand_in(x: Tensor, weight: Tensor, scale: Tensor, block: Any, *rest: Any) -> Tensor:
        weight = fp8._dequantize_fp8_weight(weight, scale, block, x.dtype)
        return nn.functional.linear(x, weight, rest[0])

    monkeypatch.setattr(fp8, "fp8_linear", stand_in)

    def make() -> PreTrainedModel:
        model, block = plain(), (GROUP, GROUP)
        for name, module in linears(model):
            shape, bias = module.weight.shape, module.bias is not None
            new = fp8.FP8Linear(shape[1], shape[0], block, has_bias=bias)
            blocks = module.weight.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).reshape(shape).to(torch.float8_e4m3fn)
            new.weight = nn.Parameter(codes, requires_grad=False)
            new.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
            new.bias = module.bias
            model.set_submodule(name, new)
        return model

    model, untouched, ids = make(), make(), prompt(10)
    plan = make_plan(model, 0.5)
    assert len(plan.vectors) == 14
    wina.sparsify(model, plan, check=False)
    with masked(untouched, plan) as decoding:
        wanted = decode(untouched, ids, decoding)
    torch.testing.assert_close(decode(model, ids), wanted)
    assert (wanted - decode(untouched, ids)).abs().max() > 0.5


def test_fp8_checkpoints_are_dequantized_where_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = plain()
    tensors = dict(model.state_dict())
    for name, module in linears(model):
        scale = module.weight.abs().max().reshape(1, 1) / 448
        tensors[f"{name}.weight"] = (module.weight / scale).detach().to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale_inv"] = scale.detach()
    block = FineGrainedFP8Config(weight_block_size=(128, 128)).to_dict()
    write(tmp_path, tensors, block)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert getattr(loaded, "hf_quantizer", None) is None
    ids = prompt(10)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0.5, atol=1.5)


@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_bytes_are_those_of_codes_and_scales(
    name: str, tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    """Counted from the library's weights; and the same as once they are laid out."""
    pytest.importorskip("torchao")
    model = quantize(plain(), Scheme.parse(name))
    plan = make_plan(model, 0.5)
    settings: Any = {"name": "tiny", "tokens": 300, "context": 100, "dense_prefix": 4}
    found = evaluate(model, tokenizer, [plan], [text], **settings).results[0]

    block, zeros = 64, 0 if name == "int8" else 1
    outputs = {"q": 64, "k": 32, "v": 32, "o": 64, "gate": 128, "up": 128, "down": 64}
    inputs = dict.fromkeys(outputs, 64) | {"down": 128}
    codes_of = {
        kind: inputs[kind] * block * -(-out * (8 if name == "int8" else 4) // (8 * block))
        for kind, out in outputs.items()
    }
    scales_of = {
        kind: out * (4 if name == "int8" else (4 + zeros) * inputs[kind] // 32)
        for kind, out in outputs.items()
    }
    head = VOCABULARY * 64 + VOCABULARY * 4
    dense = 2 * (sum(codes_of.values()) + sum(scales_of.values())) + head
    assert found.dense_bytes == dense
    extras = 4 * 2 * sum(inputs.values())
    kept = sum(
        codes_of[kind.removesuffix("_proj")] * (1 - share)
        for kind, by_block in found.by_place.items()
        for share in by_block.values()
    )
    assert 0.1 < found.sparsity < 0.9
    least, most = kept + head + extras, kept + head + extras + 2 * sum(scales_of.values())
    assert least < found.bytes <= most

    wina.sparsify(model, plan, check=False)
    before = {layer: codes.stored(layer) for _, layer in sparse_layers(model)}
    lay_out_for_decode(model)
    assert all(
        codes.packed(layer) and codes.stored(layer) == size for layer, size in before.items()
    )
