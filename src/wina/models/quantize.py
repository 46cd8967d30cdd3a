"""Quantize a model's linears on the fly, with torchao: the weights of ``--quantize``.

The blocks' linears become integers of 8 or 4 bits with scales; the head becomes int8 in either
case (a scale for each output), as it weighs a fifth and more of small models. Embeddings and norms
stay. Transformers saves and loads the result as torchao's.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from wina.errors import UsageError, WinaError
from wina.layers.linear import read_by_others
from wina.models.structure import Site, blocks, find_sites

GROUPS = (32, 64, 128)
PATTERN = re.compile(r"int(8|4)(?:-g(\d+))?")
KNOWN = "int8 (a scale for each output), int8-g32, int4 (groups of 32), int4-g64, int4-g128"


@dataclass(frozen=True)
class Scheme:
    """Integers of ``bits`` with a scale for each output and ``group`` inputs; None: all inputs."""

    bits: int
    group: int | None

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Return the scheme that a name such as int4-g64 means.

        Raises:
            UsageError: no scheme has that name.
        """
        found = PATTERN.fullmatch(text)
        group = None if found is None or found[2] is None else int(found[2])
        if found is None or group not in (None, *GROUPS):
            raise UsageError(f"unknown quantization {text!r}; known: {KNOWN}")
        bits = int(found[1])
        return cls(bits, 32 if bits == 4 and group is None else group)

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "")


def check_quantize(text: str | None) -> Scheme | None:
    """Return the scheme of ``--quantize``, if any, before a model is loaded.

    Raises:
        UsageError: no scheme has that name.
        WinaError: torchao is not installed.
    """
    if text is None:
        return None
    scheme = Scheme.parse(text)
    if importlib.util.find_spec("torchao") is None:
        raise WinaError("quantizing needs the package torchao: pip install 'wina[quantize]'")
    return scheme


@torch.no_grad()
def quantize(model: PreTrainedModel, scheme: Scheme) -> PreTrainedModel:
    """Quantize a dense model's linears and head in place, and return it.

    A head that shares the embeddings' weight gets one of its own.

    Raises:
        UsageError: it is quantized already, or groups do not divide the inputs of a linear.
    """
    if others := read_by_others(model):
        raise UsageError(f"the model is quantized already: another library keeps {others[0]}")
    sites = {site.name: site for site in find_sites(model)}
    _check(sites, scheme)
    head_name, head = _head(model)
    if head is not None and model.config.get_text_config().tie_word_embeddings:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in {id(x): x for x in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    from torchao.quantization import FqnToConfig, quantize_

    body, byte = _config(scheme), _config(Scheme(8, None))
    for name in sites:
        _one(model, name, body, quantize_)
    by_name = {f"re:{re.escape(blocks(model)[0])}\\..*": body}
    if head_name is not None:
        _one(model, head_name, byte, quantize_)
        by_name[head_name] = byte
    _tell_transformers(model, FqnToConfig(by_name))
    return model


def _one(model: nn.Module, name: str, config: Any, quantize_: Any) -> None:
    module = model.get_submodule(name)
    quantize_(module, config, filter_fn=lambda found, _: found is module)


def _config(scheme: Scheme) -> Any:
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
    )

    if scheme.group is None:
        return Int8WeightOnlyConfig(set_inductor_config=False)
    # With 16 levels a zero point of each group is worth its byte (docs/quantization.md).
    few = MappingType.ASYMMETRIC if scheme.bits == 4 else MappingType.SYMMETRIC
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"),
        granularity=PerGroup(scheme.group),
        mapping_type=few,
    )


def _check(sites: dict[str, Site], scheme: Scheme) -> None:
    for site in sites.values():
        if site.expert is not None:
            raise UsageError("experts stored as one parameter are not quantized on the fly")
        if scheme.group and site.in_features % scheme.group:
            fits = [str(Scheme(scheme.bits, g)) for g in GROUPS if site.in_features % g == 0]
            raise UsageError(
                f"{scheme} has groups of {scheme.group} inputs, and {site.name} has "
                f"{site.in_features}, not a multiple; here fit: {', '.join(fits) or 'int8'}"
            )


def _head(model: PreTrainedModel) -> tuple[str | None, Any]:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None, None
    return next(name for name, module in model.named_modules() if module is head), head


def _tell_transformers(model: PreTrainedModel, config: Any) -> None:
    """Let ``save_pretrained`` write the weights as torchao's."""
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = TorchAoConfig(quant_type=config)
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    model.config.quantization_config = settings
