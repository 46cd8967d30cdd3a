"""The benchmark: everything is set up first, then timed in turns, so that all see one machine."""

from __future__ import annotations

import copy
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina.allocation.build import versions
from wina.bench import llama_cpp, tinygemm
from wina.bench.contenders import (
    Contender,
    decoder_at,
    own_loop,
    prepacked,
    transformers_generate,
)
from wina.bench.probe import Probe
from wina.bench.report import Baseline, BenchReport, SparseResult
from wina.errors import UsageError
from wina.generation import Decoder
from wina.kernels import multiplies, use_backend
from wina.layers import SparsityCounter, change_vectors, lay_out_for_decode, phase_of, sparsify
from wina.layers.linear import read_by_others, refresh, sparse_layers
from wina.layers.quantized import packed, read, stored
from wina.models import find_sites
from wina.plan import Plan
from wina.progress import note, track
from wina.selection import check_sparsity

LONGEST_PROMPT = 512  # longer contexts are filled up without computing them
BASELINES = (
    "hf-eager",
    "hf-compiled",
    "own-compiled",
    "prepacked",
    "tinygemm",
    "llama.cpp-f16",
    "llama.cpp-bf16",
    "llama.cpp-q8_0",
    "llama.cpp-q4_0",
)
ON_CPU_ONLY = ("prepacked", *(name for name in BASELINES if name.startswith("llama.cpp")))

# Of the linears' codes; other baselines decode with the model's own weights.
LLAMA_BITS = {
    "llama.cpp-f16": None,
    "llama.cpp-bf16": None,
    "llama.cpp-q8_0": 8,
    "llama.cpp-q4_0": 4,
}


@dataclass(frozen=True)
class BenchSettings:
    """What is timed and how often.

    Attributes:
        sparsities: targets, in [0, 1).
        context: positions before the first timed token.
        batch: rows decoded together.
        rounds: turns that each way of decoding gets; medians are over them.
        tokens: decoded in a turn.
        baselines: names of ``BASELINES``; what cannot run is reported with its reason.
        compare_tokens: greedy tokens compared with the reference kernels'; 0 compares nothing.
    """

    sparsities: Sequence[float] = (0.0, 0.25, 0.5, 0.65)
    context: int = 512
    batch: int = 1
    rounds: int = 9
    tokens: int = 16
    baselines: Sequence[str] = BASELINES
    compare_tokens: int = 32

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        if not self.sparsities:
            raise UsageError("give at least one sparsity")
        for name in ("context", "batch", "rounds", "tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}")
        for baseline in self.baselines:
            if baseline not in BASELINES:
                raise UsageError(f"unknown baseline {baseline!r}; known: {', '.join(BASELINES)}")


@dataclass
class _Sparse:
    """A sparsity's decoder and what was seen of it before the timing."""

    plan: Plan
    run: Contender
    realized: float
    weight_bytes: float
    same_text: bool | None
    text_note: str
    times: list[float] = field(default_factory=list)


def bench(
    model: PreTrainedModel,
    plan_for: Callable[[float], Plan],
    settings: BenchSettings,
    *,
    name: str,
    method: str,
    include_head: bool = False,
) -> BenchReport:
    """Time a model's decoding, dense and at each sparsity, in one run.

    The sparse model's weights are a copy of the dense model's, since both are timed in turns. Plans
    whose layers all drop something share one compiled step, which reads the thresholds in turn.

    Args:
        model: dense, in evaluation mode; it stays as it is.
        plan_for: gives the plan of a target sparsity.
        settings: what is timed.
        name: of the model, for the record.
        method: of the plans, for the record.
        include_head: whether the plans cover the head, for the record.

    Raises:
        UsageError: the context does not fit the model.
    """
    device, dtype = model.device, model.dtype
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    last = settings.context + settings.tokens + 1
    if limit and last > limit:
        raise UsageError(f"a context of {settings.context} does not fit the model's {limit}")
    foreign = read_by_others(model)
    bits = _bits(model, foreign[0], name) if foreign else None
    generator = torch.Generator().manual_seed(0)
    length = min(settings.context, LONGEST_PROMPT)
    size = (settings.batch, length)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, size, generator=generator).to(device)
    plans = [plan_for(sparsity) for sparsity in settings.sparsities]

    with ExitStack() as stack:
        prefill: dict[str, float] = {}
        times: dict[str, list[float]] = {}
        runs: dict[str, Contender] = {}
        notes: dict[str, str] = {}
        for baseline in settings.baselines:
            reason = _cannot(baseline, model, settings, bits)
            if reason is None:
                note(f"setting up {baseline}")
                runs[baseline] = _baseline(baseline, model, prompt, settings, stack, prefill)
                times[baseline] = []
            else:
                notes[baseline] = reason
        other = copy.deepcopy(model) if any(_drops(plan) for plan in plans) else model
        sparse = []
        shared: _Step | None = None
        # The most sparse plan first: its layers decide which weights are laid out for skipping.
        for plan in sorted(plans, key=lambda plan: -plan.document.target_sparsity):
            note(f"setting up {plan.document.target_sparsity:.0%}")
            if not _drops(plan):  # it leaves the weights as they are
                step = _step(_twin(model), plan, prompt, settings, prefill)
            elif shared is None or not shared.serves(plan):
                step = _step(other, plan, prompt, settings, prefill)
                shared = shared or step
            else:
                step = shared
            sparse.append(_sparse(step, plan, prompt, settings))
        sparse.sort(key=lambda one: settings.sparsities.index(one.plan.document.target_sparsity))

        probe = Probe(device)
        for _ in track(range(settings.rounds), "timing", settings.rounds):
            probe.run()
            for baseline, run in runs.items():
                times[baseline].append(run(settings.tokens))
            for one in sparse:
                one.times.append(one.run(settings.tokens))

    baselines = [
        _summary(x, times.get(x), notes.get(x, ""), settings, bits) for x in settings.baselines
    ]
    dense_bytes = _weight_bytes(other) + _cache_bytes(model, settings)
    best = max(
        (x.tokens_per_second for x in baselines if x.same_precision and x.tokens_per_second),
        default=None,
    )
    return BenchReport(
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        model=name,
        method=method,
        include_head=include_head,
        context=settings.context,
        batch=settings.batch,
        read_bandwidth_gbps=probe.gbps,
        dense_bytes=int(dense_bytes),
        prefill_tokens=length,
        prefill_ms={what: seconds * 1e3 for what, seconds in prefill.items()},
        baselines=baselines,
        results=[
            _result(one, best, dense_bytes, _cache_bytes(model, settings), settings)
            for one in sparse
        ],
        versions=versions(),
    )


def _bits(model: nn.Module, name: str, model_name: str) -> int:
    """Return the bits of the codes that a linear of another library is made of."""
    weight = read(model.get_submodule(name))
    if weight is None:
        raise UsageError(
            f"another library keeps linears of {model_name}, such as {name}, whose weights are not "
            "codes of 8 or 4 bits with scales: it reads all of them, and there is no speed to "
            "measure, only quality (wina eval)"
        )
    return weight.bits


def _cannot(
    baseline: str, model: PreTrainedModel, settings: BenchSettings, bits: int | None
) -> str | None:
    """Return None, or why a baseline is left out."""
    if bits is not None and baseline in ("hf-compiled", "prepacked"):
        return "of float weights only"
    if model.device.type != "cpu" and baseline in ON_CPU_ONLY:
        return "on the CPU only"
    if baseline == "tinygemm":
        return "of quantized weights only" if bits is None else tinygemm.unavailable(model)
    if baseline == "prepacked" and not multiplies(model.dtype):
        return f"oneDNN has no {str(model.dtype).removeprefix('torch.')} on this processor"
    if baseline.startswith("llama.cpp"):
        if settings.batch > 1:
            return "at batch 1 only"
        reason = llama_cpp.unavailable(model)
        if reason is not None:
            return reason
    needs_prompt = baseline.startswith(("hf", "llama.cpp"))
    if needs_prompt and settings.context > LONGEST_PROMPT:
        return f"at contexts up to {LONGEST_PROMPT} only, which it must compute"
    return None


def _baseline(
    baseline: str,
    model: PreTrainedModel,
    prompt: Tensor,
    settings: BenchSettings,
    stack: ExitStack,
    prefill: dict[str, float],
) -> Contender:
    """Return a baseline, compiled and warmed up."""
    if baseline.startswith("hf"):
        run = transformers_generate(model, prompt, settings.tokens, baseline == "hf-compiled")
        run(settings.tokens)
        return run
    if baseline.startswith("llama.cpp"):
        form = baseline.removeprefix("llama.cpp-")
        room = settings.context + settings.tokens + 8
        decoding = llama_cpp.decoding(model, prompt, room, form, torch.get_num_threads())
        return stack.enter_context(decoding)[0]
    if baseline == "tinygemm":
        model = _twin(model)
        tinygemm.use_tinygemm(model)
    make = prepacked if baseline == "prepacked" else decoder_at
    decoder, seconds = make(model, prompt, settings.context, settings.tokens, "compiled")
    if baseline == "own-compiled":
        prefill["dense"] = seconds
    return own_loop(decoder, settings.context)


@dataclass
class _Step:
    """A sparse model's compiled step, and the thresholds that it reads.

    Attributes:
        vectors: of each layer; what is written to them is what the step goes by.
    """

    model: PreTrainedModel
    decoder: Decoder
    vectors: dict[str, Tensor]

    def serves(self, plan: Plan) -> bool:
        """Return whether the step is the plan's too, but for the thresholds."""
        every = all(bool((vector > 0).any()) for vector in plan.vectors.values())
        active = all(layer.active for _, layer in sparse_layers(self.model))
        return every and active and not plan.biases and plan.vectors.keys() == self.vectors.keys()

    def loader(self, plan: Plan) -> Callable[[], None]:
        """Return what gives the step a plan's thresholds."""
        pairs = [(self.vectors[name], v.to(self.model.device)) for name, v in plan.vectors.items()]

        def load() -> None:
            for vector, new in pairs:
                vector.copy_(new)

        return load


def _drops(plan: Plan) -> bool:
    """Return whether a plan changes anything."""
    return bool(plan.biases) or any(bool((vector > 0).any()) for vector in plan.vectors.values())


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the modules, with the very parameters of the model."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _step(
    model: PreTrainedModel,
    plan: Plan,
    prompt: Tensor,
    settings: BenchSettings,
    prefill: dict[str, float],
) -> _Step:
    """Make the model sparse; return its compiled step."""
    if phase_of(model) is None:
        sparsify(model, plan)
        if _drops(plan) or read_by_others(model):
            lay_out_for_decode(model)
        masked = [x for x, layer in sparse_layers(model) if not layer.kernels and not packed(layer)]
        if masked:
            _bits(model, masked[0], "the model")
    else:  # the weights stay where the other plans' compiled steps find them
        change_vectors(model, plan)
    decoder, seconds = decoder_at(model, prompt, settings.context, settings.tokens, "compiled")
    prefill[f"{plan.document.target_sparsity:g}"] = seconds
    return _Step(model, decoder, {name: layer.vector for name, layer in sparse_layers(model)})


def _sparse(step: _Step, plan: Plan, prompt: Tensor, settings: BenchSettings) -> _Sparse:
    """Look at a plan's text and at what it skips; return what times it."""
    model, decoder, load = step.model, step.decoder, step.loader(plan)
    if any(layer.vector is not step.vectors[name] for name, layer in sparse_layers(model)):
        for name, layer in sparse_layers(model):  # another step's plan was set up in between
            layer.register_buffer(layer.vector_name, step.vectors[name])
    load()
    for _, layer in sparse_layers(model):
        refresh(layer)
    counter = SparsityCounter(model)
    same, text_note = None, ""
    if settings.compare_tokens:
        same, text_note = _compare(model, decoder, prompt, settings.compare_tokens, counter)
    else:
        with counter:
            _decode(Decoder(model, prompt.shape[1] + 9, mode="eager", batch=len(prompt)), prompt, 8)
    realized, bytes_read = counter.sparsity, _weight_bytes(model, counter)
    loop = own_loop(decoder, settings.context)

    def run(tokens: int) -> float:
        load()
        return loop(tokens)

    return _Sparse(plan, run, realized, bytes_read, same, text_note)


@torch.no_grad()
def _decode(decoder: Decoder, prompt: Tensor, tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Return greedy tokens (tokens, batch) and the logits that each was drawn from."""
    decoder.prefill(prompt)
    ids, logits = [decoder.token[:, 0].clone()], [decoder.logits.float().clone()]
    for _ in range(tokens - 1):
        decoder.step()
        ids.append(decoder.token[:, 0].clone())
        logits.append(decoder.logits.float().clone())
    return torch.stack(ids), logits


def _compare(
    model: PreTrainedModel,
    decoder: Decoder,
    prompt: Tensor,
    tokens: int,
    counter: SparsityCounter,
) -> tuple[bool, str]:
    """Compare greedy text of a decoder with that of the reference kernels, uncompiled.

    The latter's drops are counted: what a captured graph counts lies in memory that it reuses.
    """
    tokens = min(tokens, decoder.capacity - prompt.shape[1])
    found, logits = _decode(decoder, prompt, tokens)
    with use_backend("reference"), counter:
        plain = Decoder(model, prompt.shape[1] + tokens, batch=len(prompt), mode="eager")
        wanted, their_logits = _decode(plain, prompt, tokens)
    different = (found != wanted).nonzero()
    if not len(different):
        return True, f"{tokens} tokens"
    place, row = (int(x) for x in different[0])
    ours, theirs = logits[place][row], their_logits[place][row]
    gap = float((theirs.max() - theirs[found[place, row]]).abs())
    error = float((ours - theirs).abs().max())
    return False, (
        f"token {place + 1} of {tokens} differs: its logit is {gap:.3f} below the reference's "
        f"first; rounding moves logits there by up to {error:.3f}"
    )


def _weight_bytes(model: nn.Module, counter: SparsityCounter | None = None) -> float:
    """Return the bytes of weights that one decoded token reads, embeddings' one row included.

    Scales and zeros of a quantized weight's group count if any of its channels is read.
    """
    shares = {} if counter is None else counter.by_linear()
    idle = {} if counter is None else counter.idle_groups()
    linears = {site.name: site for site in find_sites(model)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    total = 0.0
    for name, module in model.named_modules():
        weight = None if packed(module) is None else stored(module)
        if weight is not None:
            total += weight.bytes_read(shares.get(name, 0.0), idle.get(name, 0.0))
        for kind, parameter in module.named_parameters(recurse=False):
            size = parameter.numel() * parameter.element_size()
            if isinstance(module, nn.Embedding):
                total += size / module.num_embeddings
            elif kind == "weight" and weight is not None:
                continue
            elif kind == "weight" and (name in linears or module is head):
                total += size * (1 - shares.get(name, 0.0))
            else:
                total += size
    return total


def _cache_bytes(model: PreTrainedModel, settings: BenchSettings) -> float:
    """Return the bytes of keys and values that one step reads."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = settings.context * settings.batch * config.num_hidden_layers
    return float(2 * heads * size * positions * model.dtype.itemsize)


def _summary(
    name: str, times: list[float] | None, text: str, settings: BenchSettings, bits: int | None
) -> Baseline:
    same = bits == LLAMA_BITS.get(name, bits)
    if not times:
        return Baseline(name=name, tokens_per_second=None, same_precision=same, note=text)
    seconds = statistics.median(times)
    return Baseline(
        name=name,
        tokens_per_second=settings.batch / seconds,
        milliseconds=seconds * 1e3,
        same_precision=same,
        note=text,
    )


def _result(
    one: _Sparse, best: float | None, dense_bytes: float, cache: float, settings: BenchSettings
) -> SparseResult:
    seconds = statistics.median(one.times)
    speed = settings.batch / seconds
    touched = one.weight_bytes + cache
    speedup = speed / best if best else float("nan")
    return SparseResult(
        sparsity=one.plan.document.target_sparsity,
        tokens_per_second=speed,
        milliseconds=seconds * 1e3,
        speedup=speedup,
        touched_gbps=touched / seconds / 1e9,
        realized_sparsity=one.realized,
        byte_speedup=dense_bytes / touched,
        byte_efficiency=speedup / (dense_bytes / touched),
        same_text=one.same_text,
        text_note=one.text_note,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu: {platform.processor() or platform.machine()}"
