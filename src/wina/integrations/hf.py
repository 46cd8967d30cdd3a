"""Transformers: save and load sparse models with ``save_pretrained`` and ``from_pretrained``.

A saved folder keeps the base model's parameter names and layout, plus one float32 vector a
linear (``.thresholds``, or ``.scales`` with top-k). Its config names the quantization method
``wina`` and holds the plan's document, so that a plain ``from_pretrained`` after ``import wina``
builds the sparse layers and loads their vectors from the same safetensors files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from wina.errors import UsageError, WinaError
from wina.files import validate
from wina.layers import Phase, sparse_layers
from wina.layers.experts import open_experts
from wina.layers.linear import make_sparse
from wina.layers.swap import attach_phase, check_linears, densify
from wina.layers.watch import Watch
from wina.models import family_of
from wina.plan import PlanDocument

METHOD = "wina"


class WinaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a sparse model: its plan's document, without the vectors.

    ``base`` is the config of the method that the weights were quantized with before, or None.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        quant_method: str = METHOD,
        base: QuantizationConfigMixin | dict[str, Any] | None = None,
    ) -> None:
        self.quant_method = quant_method
        self.plan = plan
        self.base = AutoQuantizationConfig.from_dict(base) if isinstance(base, dict) else base

    @property
    def document(self) -> PlanDocument:
        """The plan's document; raise WinaError if the config is damaged."""
        return validate(self.plan, PlanDocument, "the config's quantization_config.plan")

    def to_dict(self) -> dict[str, Any]:
        """Return what is written into config.json."""
        found = {"quant_method": self.quant_method, "plan": copy.deepcopy(self.plan)}
        return found if self.base is None else {**found, "base": self.base.to_dict()}


class WinaQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the sparse layers as a model is loaded.

    Of a model that was quantized before, an instance is of a class that has the other quantizer's
    as its second base: that does what it does, and wina's part follows.
    """

    requires_calibration = True
    replaced: HfQuantizer | None = None  # what was in this one's place before ``attach``
    unsavable: str | None = None  # why, if so

    def __new__(cls, quantization_config: WinaConfig | None = None, **_kwargs: Any) -> Self:
        """Return an instance of the class that fits the config; of this one for a copy."""
        base = None if quantization_config is None else quantization_config.base
        return object.__new__(cls if base is None else cls.over(_quantizer_class(base)))

    def __init__(self, quantization_config: WinaConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config.base or quantization_config, **kwargs)
        self.wina = quantization_config

    @classmethod
    def over(cls, base: type[HfQuantizer]) -> type[Self]:
        """Return the class of quantizers that do what ``base`` does first."""
        return type(f"Wina{base.__name__}", (cls, base), {})

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        kwargs["checkpoint_files"] = checkpoint_files
        super()._process_model_before_weight_loading(model, **kwargs)
        document = self.wina.document
        family_of(model)  # knows the classes of its linears from here on
        open_experts(model, document.linears)
        modules = check_linears(model, document)
        biases = sum(linear.bias for linear in document.linears.values())
        wanted = {_vector_name(document): len(document.linears), "sparse_bias": biases}
        _check_vectors(checkpoint_files or (), wanted)
        for name, module in modules.items():
            linear = document.linears[name]
            vector = torch.empty(linear.in_features, dtype=torch.float32, device="meta")
            module.register_buffer(_vector_name(document), vector)
            if linear.bias:
                module.register_buffer(
                    "sparse_bias", torch.empty(linear.out_features, device="meta")
                )
        # Vectors stay float32 whatever dtype the weights are loaded in.
        model._keep_in_fp32_modules_strict = {
            *(model._keep_in_fp32_modules_strict or ()),
            _vector_name(document),
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        document = self.wina.document
        phase = Phase(document.prefill, document.dense_prefix)
        for name, linear in document.linears.items():
            module = model.get_submodule(name)
            vector = module._buffers.pop(_vector_name(document))
            bias = module._buffers.pop("sparse_bias", None)
            assert vector is not None
            if vector.dtype != torch.float32:
                raise UsageError(f"the vector of {name} was loaded as {vector.dtype}")
            make_sparse(module, vector, document.selection, linear.keep, phase, bias)
        attach_phase(model, phase)
        phase.check = Watch(list(sparse_layers(model))).look
        self.unsavable = _unsavable(model, self.quantization_config)
        # Transformers has put the other method's in their places, or none if it dequantized.
        base = getattr(model, "hf_quantizer", None)
        self.replaced = None if base is None or self.wina.base is None else _bare(self)
        if base is not None:
            model.config.quantization_config = self.wina
        else:
            attach(model, document)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        densify(model)
        return model if self.wina.base is None else super()._dequantize(model, dtype=dtype)

    def is_serializable(self) -> bool:
        """Sparse models can be saved.

        Raises:
            UsageError: the plan holds more than vectors, or the method that the weights were
                quantized with does not write what it read.
        """
        if self.unsavable:
            raise UsageError(
                f"{self.unsavable}. Keep the model as it was and the plan's own folder (plan.save)"
            )
        if self.wina.document.extras is not None:
            raise UsageError(
                "a model whose plan holds bases, low-rank terms or output gates is not saved with "
                "its weights; keep the base model and the plan's own folder (plan.save)"
            )
        return True if self.wina.base is None else bool(super().is_serializable())

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained around the sparse layers."""
        return True if self.wina.base is None else bool(super().is_trainable)

    @property
    def is_compileable(self) -> bool:
        """Sparse layers work under torch.compile."""
        return True if self.wina.base is None else bool(super().is_compileable)


def _vector_name(document: PlanDocument) -> str:
    return "thresholds" if document.selection == "threshold" else "scales"


def _quantizer_class(config: QuantizationConfigMixin) -> type[HfQuantizer]:
    """Return the class that Transformers gives models of a config."""
    return type(AutoHfQuantizer.from_config(config, pre_quantized=True))


def _unsavable(model: PreTrainedModel, config: QuantizationConfigMixin) -> str | None:
    """Return why a model of another method is not saved, sparse or not; None if it is.

    Seen with gptqmodel 7.7 and bitsandbytes 0.50.
    """
    method = getattr(config.quant_method, "value", config.quant_method)
    if method == "gptq":
        return (
            "gptqmodel converts the zeros of a GPTQ checkpoint as it loads them, and would save "
            "the new ones under the old format's name"
        )
    if method == "bitsandbytes" and config.load_in_4bit and model.device.type == "cpu":
        return "bitsandbytes mixes up the scales of 4-bit weights when it saves them from a CPU"
    return None


def _bare(quantizer: WinaQuantizer) -> HfQuantizer:
    """Return the other method's quantizer, with the same state."""
    bare: HfQuantizer = object.__new__(type(quantizer).__mro__[2])
    bare.__dict__.update(quantizer.__dict__)
    return bare


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
    """Let ``save_pretrained`` of a sparse model write what ``from_pretrained`` needs."""
    detach(model)
    base = quantizer_of(model)
    config = WinaConfig(
        document.model_dump(mode="json"), base=None if base is None else base.quantization_config
    )
    if base is None:
        model.hf_quantizer = WinaQuantizer(config, pre_quantized=True)
    else:
        over = object.__new__(WinaQuantizer.over(type(base)))
        reason = _unsavable(model, base.quantization_config)
        over.__dict__.update(base.__dict__, wina=config, replaced=base, unsavable=reason)
        model.hf_quantizer = over
    model.config.quantization_config = config


def quantizer_of(model: PreTrainedModel) -> HfQuantizer | None:
    """Return the quantizer of another method that the model was loaded with; None if none was."""
    quantizer: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    return quantizer.replaced if isinstance(quantizer, WinaQuantizer) else quantizer


def detach(model: PreTrainedModel) -> None:
    """Undo ``attach``."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, WinaQuantizer):
        return
    if quantizer.replaced is not None:
        model.hf_quantizer = quantizer.replaced
        model.config.quantization_config = quantizer.replaced.quantization_config
        return
    quantizer.remove_quantization_config(model)
    if "is_quantized" in model.__dict__:
        del model.is_quantized
