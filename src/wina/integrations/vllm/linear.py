"""Sparse linear layers in vLLM: replicated, column-, row-, merged-column- and qkv-parallel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import vllm
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.utils import set_weight_attrs

from wina.errors import UsageError, WinaError
from wina.integrations.vllm import packed
from wina.integrations.vllm.lines import line_for
from wina.integrations.vllm.ops import batch_linear
from wina.integrations.vllm.options import Options, options_of
from wina.integrations.vllm.rows import BATCH, MOST
from wina.integrations.vllm.shards import check_layer, input_shard
from wina.kernels import available_backends
from wina.kernels.cpu.library import input_major, set_crossover, use_no_pairs
from wina.plan import Plan

if TYPE_CHECKING:
    from wina.integrations.vllm.config import WinaConfig

_ANY = 1 << 40  # rows


class Planned:
    """What the plan adds to a layer of which it names at least one projection.

    Beside the weight are ``thresholds``, shape (projections, inputs of this rank), float32, and,
    if the plan has biases, ``sparse_bias``, shape (outputs of this rank,). They are parameters
    with loaders, so a checkpoint that holds them is loaded by any of vLLM's models; a plan of its
    own goes through the same loaders.

    Args:
        config: of wina.
        names: of the projections, in their order.
    """

    def __init__(self, config: WinaConfig, names: list[str]) -> None:
        super().__init__()
        self.config = config
        self.names = names
        self.options = options_of(get_current_vllm_config().additional_config)
        prepare(config, self.options)

    def add_vectors(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        params_dtype: torch.dtype,
    ) -> None:
        """Create the plan's parameters; arguments as in LinearMethodBase.

        Raises:
            WinaError: the plan does not fit the layer.
        """
        planned = self.config.planned
        check_layer(self.names, planned, input_size, len(output_partition_sizes))
        found = [planned.get(name) for name in self.names]
        self.config.claimed.update(name for name in self.names if name in planned)
        outputs = sum(output_partition_sizes)
        layer.wina_sizes = [outputs] if len(found) == 1 else list(output_partition_sizes)
        # NaN until it is loaded, so that what a checkpoint lacks is seen.
        empty = [0.0 if linear is None else float("nan") for linear in found]
        thresholds = torch.tensor(empty, dtype=torch.float32)  # whatever the model's dtype
        thresholds = thresholds[:, None].repeat(1, input_size_per_partition)
        _add(layer, "thresholds", thresholds, _thresholds_loader(layer))
        if any(linear is not None and linear.bias for linear in found):
            bias = torch.zeros(outputs, dtype=params_dtype)
            _add(layer, "sparse_bias", bias, layer.weight_loader, output_dim=0)

    def load_vectors(self, layer: Any) -> None:
        """Bring in the plan, and say in ``layer.wina_active`` whether it changes the layer.

        Raises:
            WinaError: the checkpoint lacks vectors, or no layer holds some linear of the plan.
        """
        self.config.check_claimed()
        if self.config.source is not None:
            self._load_plan(layer, _plan(self.config.source, self.config.revision))
        if bool(layer.thresholds.isnan().any()):
            raise WinaError(
                f"the checkpoint lacks thresholds of {', '.join(self.names)}; save the sparse "
                "model again"
            )
        sparse_bias = getattr(layer, "sparse_bias", None)
        layer.wina_active = bool((layer.thresholds > 0).any()) or sparse_bias is not None
        # Of ranks that each have a part of the inputs, one adds the bias, as with vLLM's own.
        layer.wina_bias = not (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0)

    def _load_plan(self, layer: Any, plan: Plan) -> None:
        shards: list[Any] = [None]
        if len(self.names) > 1:
            is_qkv = isinstance(layer, QKVParallelLinear)
            shards = list("qkv") if is_qkv else list(range(len(self.names)))
        layer.thresholds.data.zero_()
        if hasattr(layer, "sparse_bias"):
            layer.sparse_bias.data.zero_()
        for name, shard in zip(self.names, shards, strict=True):
            if (own := self.config.names.get(name)) is None:
                continue
            arguments = () if shard is None else (shard,)
            layer.thresholds.weight_loader(layer.thresholds, plan.vectors[own], *arguments)
            if own in plan.biases:
                layer.sparse_bias.weight_loader(layer.sparse_bias, plan.biases[own], *arguments)


@register_weight_loader_v2_supported_method
class WinaLinearMethod(Planned, UnquantizedLinearMethod):  # type: ignore[misc]
    """Computes a planned layer whose weight is vLLM's own, as dense layers have it."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the weight, and what the plan adds; arguments as in LinearMethodBase."""
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        sizes = (input_size_per_partition, output_partition_sizes, input_size)
        self.add_vectors(layer, *sizes, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring in the plan, and store the weight as the kernels want it.

        Raises:
            WinaError: the checkpoint lacks vectors, or no layer holds some linear of the plan.
        """
        self.load_vectors(layer)
        if not layer.wina_active:
            super().process_weights_after_loading(layer)
            return
        if layer.weight.device.type != "cpu":
            BATCH.prepare(layer.weight.device)
        if layer.weight.device.type not in _kernel_devices():
            return
        usual = layer.weight.data
        layer.weight.data = input_major(usual)
        exact = self.options.batch_invariant or usual.dtype == torch.float32
        if usual.device.type == "cpu" and exact:
            # One kernel for any number of rows, of a projection and of the whole layer: see ops.
            for outputs in {*layer.wina_sizes, len(usual)}:
                set_crossover(usual.dtype, usual.shape[1], outputs, _ANY)
        if self.options.dense_copy and usual.device.type == "cpu":
            products = packed.pack(list(torch.split(usual, layer.wina_sizes)))
            packed.remember(layer.weight, products)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's outputs on this rank, shape (..., outputs)."""
        if not layer.wina_active:
            dense: Tensor = super().apply(layer, x, bias)
            return dense
        extra = getattr(layer, "sparse_bias", None) if layer.wina_bias else None
        flat = x.reshape(-1, x.shape[-1])
        y = batch_linear(flat, layer.weight, layer.thresholds, layer.wina_sizes, bias, extra)
        return y.view(*x.shape[:-1], y.shape[-1])


def _add(layer: Any, name: str, data: Tensor, loader: Any, **attributes: Any) -> None:
    parameter = nn.Parameter(data, requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": loader, **attributes})
    layer.register_parameter(name, parameter)


def _thresholds_loader(layer: Any) -> Any:
    def load(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        place = "qkv".index(shard) if isinstance(shard, str) else shard or 0
        held = parameter.shape[1]
        parameter.data[place].copy_(input_shard(loaded, held, layer.tp_rank))

    return load


@cache
def _plan(source: str, revision: str | None) -> Plan:
    return Plan.load(source, revision)


@cache
def _kernel_devices() -> frozenset[str]:
    """Return the types of devices whose kernels skip rows of W."""
    places = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
    return frozenset(places[name] for name in available_backends() if name in places)


def prepare(config: WinaConfig, options: Options) -> None:
    """Let vLLM's runner say which rows of a batch are sparse under a plan.

    The plan goes into the key of what vLLM compiles: which layers are sparse is part of the code.

    Raises:
        UsageError: vLLM was told to cut batches in a way that wina does not follow, or an option
            does not fit the device.
    """
    current = get_current_vllm_config()
    parallel, scheduler = current.parallel_config, current.scheduler_config
    if parallel.use_ubatching or parallel.prefill_context_parallel_size > 1:
        raise UsageError(
            "wina does not follow micro-batches (--enable-dbo) and prefill context parallelism; "
            "run vLLM without them"
        )
    if scheduler.max_num_batched_tokens > MOST:
        raise UsageError(f"wina takes --max-num-batched-tokens of up to {MOST}")
    if isinstance(current.additional_config, dict):
        current.additional_config["wina_plan"] = config.digest
    document = config.document
    BATCH.prefill, BATCH.dense_prefix = document.prefill, document.dense_prefix
    line = line_for(vllm.__version__)
    line.watch_runners(BATCH.start)
    on_cpu = current.device_config.device_type == "cpu"
    if options != Options() and not on_cpu:
        raise UsageError("dense_copy and batch_invariant of additional_config's wina are for CPUs")
    BATCH.exact = options.batch_invariant
    if on_cpu and (options.batch_invariant or _dtype(current) == torch.float32):
        line.attend_in_one_piece()
    if options.batch_invariant:
        use_no_pairs()


def _dtype(config: Any) -> torch.dtype | None:
    return None if config.model_config is None else config.model_config.dtype
