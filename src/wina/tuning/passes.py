"""One pass of tuning: the KL of a batch of windows, and its gradients.

On CUDA the kernels of a pass are recorded once and replayed (a CUDA graph): a small model's pass
is thousands of launches, which would take longer than the work they start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina.calibration.collect import gradient_checkpointed
from wina.layers import opened
from wina.layers.experts import ExpertLinear
from wina.layers.linear import align
from wina.models import Site
from wina.progress import note
from wina.tuning.divergence import divergence
from wina.tuning.gate import GateState, StraightThrough

LOGITS = 1 << 31  # bytes of logits in float32 at once
ACTIVATIONS = 4 << 30  # bytes of activations at once, without CUDA; with it a quarter of its memory
WARM_UPS = 2


class Pass:
    """Forward and backward over windows of one length.

    Attributes:
        state: what the gates dropped, and how fast that grows with log t.
        kl: mean KL(dense || sparse) of the last batch, nats a token, shape ().
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        log_t: Tensor,
        bias: Tensor | None,
        bias_scale: Tensor,
        *,
        shape: tuple[int, int],
        dense_prefix: int,
        temperature: float,
        checkpointing: bool | None,
    ) -> None:
        """Prepare passes.

        Args:
            model: dense, in evaluation mode.
            sites: the linears to gate.
            log_t: flat over all their channels, float32; its ``grad`` is set by ``run``.
            bias: flat over all their outputs, in units of ``bias_scale``; None for none.
            bias_scale: as ``bias``.
            shape: windows a batch, positions a window.
            dense_prefix: first positions of a window, which stay dense and do not count.
            temperature: width of the soft gate.
            checkpointing: see TuningSettings.
        """
        batch, positions = shape
        device = model.device
        self.model, self.sites = model, sites
        self.log_t, self.bias, self.bias_scale = log_t, bias, bias_scale
        self.skip = dense_prefix
        self.scored = batch * (positions - dense_prefix)
        rows = torch.arange(positions, device=device) >= dense_prefix
        dropped = torch.zeros(len(sites), device=device)
        self.state = GateState(rows, temperature, dropped, torch.zeros_like(log_t))
        self.kl = torch.zeros((), device=device)
        self.checkpointing, windows = _fitting(model, sites, shape, checkpointing)
        self.ids = torch.zeros((windows, positions), dtype=torch.int64, device=device)
        self._replay: Callable[[], None] | None = None
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    @property
    def parameters(self) -> list[Tensor]:
        """What is tuned."""
        return [self.log_t] if self.bias is None else [self.log_t, self.bias]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Freeze the model's parameters, and checkpoint if that is to be; needed around ``run``."""
        with (gradient_checkpointed if self.checkpointing else _frozen)(self.model):
            yield

    def run(self, ids: Tensor) -> None:
        """Set ``kl``, ``state`` and the parameters' gradients for ids (batch, positions)."""
        if self._replay is None:
            self.ids.copy_(ids[: len(self.ids)])
            # An expert's rows depend on the tokens: no two passes have the same kernels.
            routed = any(site.expert is not None for site in self.sites)
            self._replay = self._part if routed else _recorded(self._part, ids.device)
        self.state.reset()
        self.kl.zero_()
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()
        for part in torch.split(ids, len(self.ids)):
            self.ids.copy_(part)
            self._replay()

    def _part(self) -> None:
        with torch.no_grad():
            dense = self._logits()
        with torch.enable_grad(), self._gated():
            kl = divergence(self._logits(), dense) / self.scored
            kl.backward()  # type: ignore[no-untyped-call]
        self.kl += kl.detach()

    def _logits(self) -> Tensor:
        logits = self.model(self.ids, use_cache=False).logits
        return logits[:, self.skip :].flatten(0, 1)  # type: ignore[no-any-return]

    @contextmanager
    def _gated(self) -> Iterator[None]:
        """Gate each linear's input and add its bias, on sparse positions, inside the block."""
        log_ts = torch.split(self.log_t, [site.in_features for site in self.sites])
        outputs = [site.out_features for site in self.sites]
        biases = None if self.bias is None else torch.split(self.bias * self.bias_scale, outputs)
        handles, first = [], 0
        with opened(self.model):
            modules = dict(self.model.named_modules())
            for index, site in enumerate(self.sites):
                module = modules[site.name]
                gate = _gate_hook(log_ts[index], self.state, index, first)
                handles.append(module.register_forward_pre_hook(gate))
                if biases is not None:
                    hook = _bias_hook(biases[index], self.state)
                    handles.append(module.register_forward_hook(hook))
                first += site.in_features
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()


def _gate_hook(log_t: Tensor, state: GateState, index: int, first: int) -> Callable[..., Any]:
    def gate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        own = replace(state, rows=_rows(module, state.rows))
        return (StraightThrough.apply(args[0], log_t, own, index, first),)  # type: ignore[no-untyped-call]

    return gate


def _bias_hook(bias: Tensor, state: GateState) -> Callable[..., Any]:
    def add(module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor:
        return y + bias.to(y.dtype) * align(_rows(module, state.rows), y)

    return add


def _rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Return which rows of the module's input are sparse: an expert sees those routed to it."""
    places = module.places if isinstance(module, ExpertLinear) else None
    return rows if places is None else rows[places % len(rows)]


def _fitting(
    model: PreTrainedModel,
    sites: Sequence[Site],
    shape: tuple[int, int],
    checkpointing: bool | None,
) -> tuple[bool, int]:
    """Return whether to checkpoint, and the windows of a batch that one forward pass takes."""
    batch, positions = shape
    room = ACTIVATIONS
    if model.device.type == "cuda":
        room = torch.cuda.get_device_properties(model.device).total_memory // 4
    # Beside each linear's input and output about as much again is kept: norms, attention, gates.
    widths = sum(site.in_features + site.out_features for site in sites)
    fitting = room // (2 * widths * model.dtype.itemsize * positions)
    if checkpointing is None:
        checkpointing = fitting < 1
    most = LOGITS // (4 * positions * model.config.get_text_config().vocab_size)
    if not checkpointing:
        most = min(most, fitting)
    sizes = [size for size in range(1, batch + 1) if batch % size == 0 and size <= most]
    return checkpointing, max(sizes, default=1)


def _recorded(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return the function, on CUDA as a graph of its kernels."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:  # a model that waits for the device, or chooses by its values
        note(f"tuning goes on without a CUDA graph, slower: {str(error).splitlines()[0]}")
        return function
    return graph.replay


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Keep parameters out of the graph inside the block."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
