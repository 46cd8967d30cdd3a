"""One decode step of an unmodified Transformers model, with nothing of it left to Python.

The keys and values lie in a static cache, the token and the logits in fixed tensors, so that a
step reads and writes the same memory each time. That allows two things. torch.compile traces the
step once, and what it made is called on those tensors directly, without the checks of its inputs
(a millisecond or two a step for a hundred layers). And on a CUDA device the whole step, sampling
included, is captured in one CUDA graph, so that the host only launches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from wina.errors import UsageError
from wina.generation.attention import decoding_attention
from wina.generation.sampling import Sampling, draw
from wina.kernels.blocks import release, run_blocks
from wina.kernels.fusion import fuse
from wina.layers import measure_batches, phase_of
from wina.progress import note

Mode = Literal["auto", "eager", "compiled"]
KNOWN = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that a static one replaces
FEW = 4  # rows for which skipping always pays
ROUND = 256  # capacities are multiples of it, so that few sizes are compiled


class Decoder:
    """Decodes with a model as it is now: dense, or sparse under its plan.

    Make another one after ``sparsify``, ``densify`` or a change of the weights' layout.

    Attributes:
        token: the last token of each row, int64 (batch, 1); a step replaces it.
        logits: what the last token was drawn from, shape (batch, vocabulary).
        capacity: positions that fit.
        mode: eager or compiled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        *,
        batch: int = 1,
        mode: Mode = "auto",
        sampling: Sampling | None = None,
    ) -> None:
        """Reserve nothing yet; memory is taken by the first prompt.

        Args:
            model: in evaluation mode.
            capacity: positions that must fit.
            batch: rows that are decoded together.
            mode: auto is compiled on CUDA and eager elsewhere: on a CPU compiling takes half a
                minute and more, which only long texts earn back. A decoder that was asked to be
                eager is not captured in a CUDA graph either: each step runs what the model runs.
            sampling: how tokens are drawn; None is greedy.

        Raises:
            UsageError: an unknown mode, or no position.
        """
        if mode not in get_args(Mode):
            raise UsageError(f"unknown mode {mode!r}; known: {', '.join(get_args(Mode))}")
        if capacity < 1 or batch < 1:
            raise UsageError("a decoder needs room for at least one row of one position")
        device = model.device
        self.model = model
        self.batch = batch
        self.capacity = -(-capacity // ROUND) * ROUND
        on_gpu = device.type == "cuda"
        self._captures = on_gpu and mode != "eager"
        self.mode: Mode = mode if mode != "auto" else "compiled" if on_gpu else "eager"
        self.sampling = sampling or Sampling()
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)
        self._generator = torch.Generator(device)
        self._cache: Cache | None = None
        self._static = False
        self._refused = False  # the model cannot decode with a static cache
        self._prompt = torch.empty(0)
        self._forward: Callable[[], object] | None = None
        self._graph: Any = None
        self._steps = 0
        self.reseed(self.sampling.seed)
        if batch > FEW:
            measure_batches(model)

    def reseed(self, seed: int) -> None:
        """Start the draws anew."""
        self._generator.manual_seed(seed)

    @torch.no_grad()
    def prefill(self, prompt: Tensor | Sequence[Sequence[int]]) -> None:
        """Read prompts of one length, as the plan's prefill says, and draw the token after them.

        Args:
            prompt: ids, shape (batch, positions).

        Raises:
            UsageError: the shape does not fit.
        """
        ids = torch.as_tensor(prompt, device=self.model.device)
        if ids.ndim != 2 or len(ids) != self.batch or not 0 < ids.shape[1] <= self.capacity:
            raise UsageError(
                f"a prompt of shape {tuple(ids.shape)} does not fit a decoder of {self.batch} "
                f"rows and {self.capacity} positions"
            )
        self._read(ids)
        self._draw()

    def _read(self, ids: Tensor) -> None:
        cache = DynamicCache(config=self.model.config)
        output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if self.logits.numel() == 0:
            self.logits = torch.empty_like(output.logits[:, -1])
        self.logits.copy_(output.logits[:, -1])
        del output
        self._prompt = ids
        self._keep(cache, ids.shape[1])

    @torch.no_grad()
    def step(self) -> None:
        """Read ``token`` and replace it by the one that follows; on CUDA, don't wait for it."""
        if self._graph is not None:
            self._graph.replay()
            return
        if self._captures and self._static and self._steps == 2:
            self._capture()
            if self._graph is not None:
                self._graph.replay()
                return
        self._compute()
        self._draw()
        self._steps += 1

    def seek(self, position: int) -> None:
        """Go to a position, for benchmarks.

        What was decoded after it is forgotten; what lies between a prompt and a later position
        is zeros.

        Raises:
            UsageError: the model has no static cache, or the position is outside it.
        """
        if self._cache is None or not self._static or not 0 < position < self.capacity:
            raise UsageError(f"the decoder cannot go to position {position}")
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(position)

    def _compute(self) -> None:
        if self._forward is not None:
            self._forward()
            return
        try:
            with self._decoding():
                self._first()
        except Exception:  # whatever a model raises about shapes
            if not self._static or self._steps > 0:
                raise
            # Some models build what they add to the scores (ALiBi) for the positions so far, not
            # for those that fit. They decode with the cache that they make themselves.
            self._refused = True
            self._read(self._prompt)
            with self._decoding():
                self._eager()

    def _first(self) -> None:
        if self.mode == "compiled" and self._static:
            try:
                self._forward = record(self._eager)
                return
            except Exception as error:  # compilers fail in their own ways
                note(f"torch.compile failed, decoding goes on without it: {error}")
                self.mode = "eager"
        self._eager()

    def _eager(self) -> None:
        output = self.model(
            self.token, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self.logits.copy_(output.logits[:, -1])

    def _draw(self) -> None:
        self.token.copy_(draw(self.logits, self.sampling, self._generator)[:, None])

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        phase = phase_of(self.model)
        with ExitStack() as stack:
            if phase is not None:
                stack.enter_context(phase.force("sparse"))
            if self._static:
                stack.enter_context(decoding_attention(self.model))
            yield

    def _keep(self, prompt: DynamicCache, positions: int) -> None:
        """Take over a prompt's keys and values into the static cache, where the model has one.

        Layers with a sliding window get the full length too: the mask knows the window.
        """
        if self._refused or any(type(layer) not in KNOWN for layer in prompt.layers):
            self._cache, self._static = prompt, False
            return
        if self._cache is None:
            self._static = True
            self._cache = Cache(layers=[StaticLayer(self.capacity) for _ in prompt.layers])
        for kept, layer in zip(self._cache.layers, prompt.layers, strict=True):
            if not kept.is_initialized:
                kept.lazy_initialization(layer.keys, layer.values)
            first = positions - layer.keys.shape[2]
            kept.keys[:, :, first:positions] = layer.keys
            kept.values[:, :, first:positions] = layer.values
            kept.cumulative_length.fill_(positions)
            layer.keys = layer.values = None

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph), self._decoding():
                if self._forward is None:
                    self._eager()
                else:
                    self._forward()
                self._draw()
        except RuntimeError as error:
            note(f"the decode step cannot be captured in a CUDA graph: {error}")
            self._steps += 1  # not tried again
            return
        self._graph = graph


def record(function: Callable[[], object]) -> Callable[[], object]:
    """Run a function of fixed tensors under torch.compile; return what repeats it.

    The function must read and write the same tensors at every call, and nothing else: that is
    not checked again.

    Args:
        function: takes no argument; traced in one graph, with wina's operators fused.
    """
    calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
    numbers: list[int] = []  # of rows of blocks that the CPU library runs

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx

        graph, kept, rows = run_blocks(fuse(graph), inputs)
        numbers.extend(rows)
        given = [inputs[i] for i in kept]
        # On CUDA inductor makes products of one row itself then, fused with what is around them
        # (a dense step of Llama-3-8B's shape takes 0.96 of the time), and does not write what
        # another library's weight stands for to memory first.
        on_cuda = any(x.is_cuda for x in given)
        with inductor.patch(coordinate_descent_tuning=on_cuda):
            compiled: Any = compile_fx(graph, given)

        def call(*arguments: Any) -> object:
            remaining = tuple(arguments[i] for i in kept)
            calls.append((compiled, remaining))
            return compiled(*remaining)

        return call

    def traced() -> object:
        return function()

    # Its own code object, so that torch.compile keeps what it knows of others apart.
    own = FunctionType(traced.__code__.replace(), globals(), closure=traced.__closure__)
    torch.compile(own, backend=backend, fullgraph=True, dynamic=False)()
    (compiled, arguments), *more = calls
    assert not more, "a step in one graph calls it once"

    def step() -> object:
        return compiled(*arguments)

    release(step, numbers)
    return step
