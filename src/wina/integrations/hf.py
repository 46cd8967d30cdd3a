"""Transformers: save and load sparse models with ``save_pretrained`` and ``from_pretrained``.

A saved folder keeps the base model's parameter names and layout, plus one float32 vector a
linear (``.thresholds``, or ``.scales`` with top-k). Its config names the quantization method
``wina`` and holds the plan's document, so that a plain ``from_pretrained`` after ``import wina``
builds the sparse layers and loads their vectors from the same safetensors files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from wina.errors import UsageError, WinaError
from wina.files import validate
from wina.layers import Phase, sparse_layers
from wina.layers.experts import open_experts
from wina.layers.linear import make_sparse, matrix, refresh
from wina.layers.swap import attach_phase, check_linears, densify, phase_of
from wina.layers.watch import Watch
from wina.models import family_of
from wina.plan import PlanDocument

METHOD = "wina"


class WinaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a sparse model: its plan's document, without the vectors."""

    def __init__(self, plan: dict[str, Any], quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.plan = plan

    @property
    def document(self) -> PlanDocument:
        """The plan's document; raise WinaError if the config is damaged."""
        return validate(self.plan, PlanDocument, "the config's quantization_config.plan")


class WinaQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the sparse layers before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> PreTrainedModel:
        document = self.quantization_config.document
        vector_name = "thresholds" if document.selection == "threshold" else "scales"
        family_of(model)  # knows the classes of its linears from here on
        open_experts(model, document.linears)
        modules = check_linears(model, document)
        biases = sum(linear.bias for linear in document.linears.values())
        wanted = {vector_name: len(document.linears), "sparse_bias": biases}
        _check_vectors(checkpoint_files or (), wanted)
        phase = Phase(document.prefill, document.dense_prefix)
        for name, module in modules.items():
            linear = document.linears[name]
            device = matrix(module).device
            vector = torch.empty(linear.in_features, dtype=torch.float32, device=device)
            bias = torch.empty(linear.out_features, device=device) if linear.bias else None
            make_sparse(module, vector, document.selection, linear.keep, phase, bias)
        attach_phase(model, phase)
        # Vectors stay float32 whatever dtype the weights are loaded in.
        model._keep_in_fp32_modules_strict = {
            *(model._keep_in_fp32_modules_strict or ()),
            vector_name,
        }
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_kwargs: Any
    ) -> PreTrainedModel:
        for name, layer in sparse_layers(model):
            if layer.vector.dtype != torch.float32:
                raise UsageError(f"the vector of {name} was loaded as {layer.vector.dtype}")
            refresh(layer)
        if (phase := phase_of(model)) is not None:
            phase.check = Watch(list(sparse_layers(model))).look
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        del dtype
        densify(model)
        return model

    def is_serializable(self) -> bool:
        """Sparse models can be saved; raise UsageError if their plan holds more than vectors."""
        if self.quantization_config.document.extras is not None:
            raise UsageError(
                "a model whose plan holds bases, low-rank terms or output gates is not saved with "
                "its weights; keep the base model and the plan's own folder (plan.save)"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained around the sparse layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Sparse layers work under torch.compile."""
        return True


def _check_vectors(checkpoint_files: Sequence[str], wanted: Mapping[str, int]) -> None:
    """Raise WinaError if safetensors files lack vectors: Transformers would make them up.

    They are counted by name of the buffer, since Transformers may rename what it loads.
    """
    files = [file for file in checkpoint_files if str(file).endswith(".safetensors")]
    keys: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            keys += opened.keys()
    for name, count in wanted.items():
        found = sum(key.endswith(f".{name}") for key in keys)
        if files and found != count:
            raise WinaError(
                f"the checkpoint holds {found} '.{name}' vectors and its plan {count}; "
                "save the sparse model again"
            )


def register() -> None:
    """Make ``from_pretrained`` know the method ``wina``; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(WinaConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(WinaQuantizer)


def attach(model: PreTrainedModel, document: PlanDocument) -> None:
    """Let ``save_pretrained`` of a sparse model write what ``from_pretrained`` needs.

    Raises:
        UsageError: the model is quantized by another method, whose config would be lost.
    """
    check_unquantized(model)
    config = WinaConfig(document.model_dump(mode="json"))
    model.config.quantization_config = config
    model.hf_quantizer = WinaQuantizer(config, pre_quantized=True)


def check_unquantized(model: PreTrainedModel) -> None:
    """Raise UsageError if the model is quantized by another method."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, WinaQuantizer):
        method = quantizer.quantization_config.quant_method
        raise UsageError(
            f"the model is quantized with {getattr(method, 'value', method)!r}; wina sparsifies "
            "float32, bfloat16 and float16 weights. Load it dequantized."
        )


def detach(model: PreTrainedModel) -> None:
    """Undo ``attach``."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, WinaQuantizer):
        quantizer.remove_quantization_config(model)
        if "is_quantized" in model.__dict__:
            del model.is_quantized
