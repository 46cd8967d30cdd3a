"""The quantization method ``wina`` of vLLM: which plan, and which layers are sparse."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from wina.errors import UsageError, WinaError
from wina.files import validate
from wina.integrations.vllm.compressed import check_base
from wina.integrations.vllm.lines import line_for
from wina.integrations.vllm.shards import check_servable, missing, projections_of
from wina.models.identity import config_hash, files_hash
from wina.plan import Plan, PlanDocument, PlannedLinear

METHOD = "wina"
CAPABILITY = 80  # of the GPU; bfloat16


class WinaConfig(QuantizationConfig):  # type: ignore[misc]
    """A plan in vLLM.

    Attributes:
        source: the plan's folder or hub id; None where the vectors are in the model's checkpoint.
        revision: of a hub id.
        document: everything of the plan but its vectors.
        digest: of the plan; what vLLM compiled for one plan must not serve another.
        planned: the plan's linears by vLLM's name of them.
        claimed: those that a layer of this process holds.
        base: vLLM's config of the method that the weights were quantized with before, or None.
    """

    def __init__(
        self, document: PlanDocument, source: str | None, revision: str | None, digest: str
    ) -> None:
        super().__init__()
        self.document = document
        self.digest = digest
        self.source = source
        self.revision = revision
        self.planned: dict[str, PlannedLinear] = dict(document.linears)
        self.names = {name: name for name in document.linears}  # vLLM's -> the plan's
        self.claimed: set[str] = set()
        self.base: Any = None

    def __repr__(self) -> str:
        return f"wina({self.source or 'checkpoint'}, {self.document.target_sparsity:.0%})"

    @classmethod
    def get_name(cls) -> str:
        """Return the method's name."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return what the kernels compute in."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability of a GPU."""
        return CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: the config is in config.json or given to vLLM."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WinaConfig:
        """Make it from ``quantization_config``: ``plan`` is a folder, a hub id or a document.

        Raises:
            UsageError: vLLM's version is none that wina knows, or vLLM cannot run the plan.
            WinaError: there is no such plan, or it is damaged.
        """
        import vllm

        line_for(vllm.__version__)
        plan, revision, base = (config.get(key) for key in ("plan", "revision", "base"))
        if isinstance(plan, dict):
            document = validate(plan, PlanDocument, "the config's quantization_config.plan")
            source, digest = None, _digest(document, {})
        elif isinstance(plan, str):
            loaded, source = Plan.load(plan, revision), plan
            document, digest = loaded.document, _digest(loaded.document, loaded.vectors)
        else:
            raise UsageError(
                'wina needs a plan: --hf-overrides \'{"quantization_config": '
                '{"quant_method": "wina", "plan": "FOLDER_OR_HUB_ID"}}\''
            )
        check_servable(document)
        found = cls(document, source, revision, digest)
        if base is not None:
            found.build_on(base)
        return found

    def build_on(self, config: Mapping[str, Any]) -> None:
        """Take the ``quantization_config`` that the model has without wina.

        Raises:
            UsageError: wina does not run on top of that method in vLLM.
        """
        from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

        check_base(config)
        self.base = compressed_tensors.CompressedTensorsConfig.from_config(copy.deepcopy(config))
        text = self.digest + json.dumps(config, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Take how the model is quantized; raise WinaError if the plan was made for another one.

        A plan beside a model takes the place of the config that says so: that is read again.
        Weights are compared where they lie in a local folder as Transformers names them.
        """
        if self.base is None and (base := _base_of(model_name, revision)) is not None:
            self.build_on(base)
        if hf_config is None:
            return
        wanted = self.document.model
        # vLLM's main process asks before it starts others, which find the hash in the cache.
        weights = None if self.source is None else files_hash(Path(model_name), hf_config)
        found = wanted.model_copy(
            update={
                "name": model_name,
                "revision": revision,
                "config_hash": config_hash(hf_config),
                "weights_hash": weights or wanted.weights_hash,
            }
        )
        wanted.check(found)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take vLLM's names of the linears."""

        def renamed(name: str) -> str:
            found: list[str] = hf_to_vllm_mapper.apply_list([name])
            return found[0] if found else name

        if self.base is not None:
            self.base.apply_vllm_mapper(hf_to_vllm_mapper)
        self.names = {renamed(name): own for name, own in self.names.items()}
        self.planned = {name: self.document.linears[own] for name, own in self.names.items()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how vLLM computes a layer; None leaves it to vLLM.

        Raises:
            UsageError: the plan names experts, or linears that are quantized in another format
                than wina runs.
        """
        import vllm
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from wina.integrations.vllm.linear import WinaLinearMethod

        if self.base is not None:
            self.base.packed_modules_mapping = self.packed_modules_mapping
        if isinstance(layer, LinearBase):
            names = projections_of(prefix, self.planned, self.packed_modules_mapping)
            if self.base is None:
                return WinaLinearMethod(self, names) if names else UnquantizedLinearMethod()
            if names:
                from wina.integrations.vllm.quantized import method_for

                return method_for(self, layer, names, prefix) or WinaLinearMethod(self, names)
        if isinstance(layer, line_for(vllm.__version__).expert_class()):
            parent = prefix.rpartition(".")[0] if prefix.endswith("routed_experts") else prefix
            if any(name.startswith(f"{parent}.") for name in self.planned):
                raise UsageError(
                    f"the plan names experts of {parent}, which vLLM computes fused and wina does "
                    "not run there yet; serve a plan of the other linears, or the model without one"
                )
        return None if self.base is None else self.base.get_quant_method(layer, prefix)

    def check_claimed(self) -> None:
        """Raise WinaError if vLLM's model has no layer for a linear of the plan."""
        if left := missing(self.claimed, self.planned):
            raise WinaError(
                f"vLLM's model has no layer for {len(left)} of the plan's linears, such as "
                f"{left[0]}; vLLM builds this architecture in another way than Transformers"
            )


def _base_of(model: str, revision: str | None) -> dict[str, Any] | None:
    """Return the method that a model's weights are quantized with, by its own config; or None."""
    from transformers import PretrainedConfig

    try:
        found, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except OSError:  # vLLM reads other formats, too
        return None
    places = (found, found.get("text_config") or {})
    given = [x.get("quantization_config") for x in places] + [found.get("compression_config")]
    config: dict[str, Any] | None = next(filter(None, given), None)
    if config is not None and config.get("quant_method") == METHOD:  # a saved sparse model
        config = config.get("base")
    return config


def _digest(document: PlanDocument, vectors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(document.model_dump_json().encode())
    for name in sorted(vectors):
        total.update(vectors[name].numpy().tobytes())
    return total.hexdigest()
