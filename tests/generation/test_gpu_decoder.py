"""Whole models on a GPU: compiled, fused, captured; on a CUDA device only: pytest -m gpu."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import wina
from tests.helpers import make_plan
from wina.bench import BenchSettings, bench
from wina.generation import Decoder
from wina.generation import decoder as decoder_module
from wina.kernels import available_backends, use_backend
from wina.kernels.fusion import fuse
from wina.layers import lay_out_for_decode, phase_of
from wina.plan import Plan

pytestmark = pytest.mark.gpu

GPU = [name for name in ("cuda", "triton") if name in available_backends()]


@pytest.fixture(autouse=True)
def _compile_here() -> Iterator[None]:
    """Compile in this process: the few kernels of these models don't need inductor's workers.

    With them, pytest-xdist's processes were seen to hang at their end, waiting for them to go.
    """
    with inductor_config.patch(compile_threads=1):
        yield


@pytest.fixture(params=GPU)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def small_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval().cuda()


@pytest.mark.parametrize("batch", [1, 8])
def test_a_model_decodes_the_references_text(backend: str, batch: int) -> None:
    """Compiled, fused and captured, in float32: the greedy tokens of the plain kernels."""
    model = small_model()
    wina.sparsify(model, make_plan(model, 0.5), check=False)
    prompt = torch.randint(300, (batch, 7), generator=torch.Generator().manual_seed(1)).cuda()
    texts = []
    for name, mode in (("reference", "eager"), (backend, "compiled")):
        if name == backend:
            lay_out_for_decode(model)
        with use_backend(name):
            decoder = Decoder(model, 40, batch=batch, mode=mode)
            decoder.prefill(prompt)
            tokens = []
            for _ in range(24):
                decoder.step()
                tokens.append(decoder.token[:, 0].tolist())
        texts.append(tokens)
        assert mode == "eager" or (decoder.mode == "compiled" and decoder._graph is not None)
    assert texts[0] == texts[1]


def plan_of(model: PreTrainedModel) -> Callable[[float], Plan]:
    def make(target: float) -> Plan:
        plan = make_plan(model, target)
        document = plan.document.model_copy(update={"target_sparsity": target})
        return replace(plan, document=document)

    return make


def test_the_benchmark() -> None:
    model = small_model()
    settings = BenchSettings(
        sparsities=(0.0, 0.3, 0.6),
        context=40,
        rounds=2,
        tokens=4,
        baselines=("own-compiled", "hf-eager"),
        compare_tokens=6,
    )
    report = bench(model, plan_of(model), settings, name="tiny", method="wina")
    assert [one.same_text for one in report.results] == [True] * 3
    assert report.results[0].realized_sparsity == 0
    assert report.results[1].realized_sparsity < report.results[2].realized_sparsity


@pytest.mark.parametrize("sparse", [True, False])
def test_a_layers_attention_is_one_operator(
    monkeypatch: pytest.MonkeyPatch, backend: str, sparse: bool
) -> None:
    seen: Counter[str] = Counter()

    def count(graph: GraphModule) -> GraphModule:
        fuse(graph)
        seen.update(
            str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes
        )
        return graph

    monkeypatch.setattr(decoder_module, "fuse", count)
    model = small_model()
    if sparse:
        wina.sparsify(model, make_plan(model, 0.5), check=False)
    with use_backend(backend):
        decoder = Decoder(model, 40, mode="compiled")
        decoder.prefill([[1, 2, 3]])
        decoder.step()
    layers = model.config.num_hidden_layers
    assert seen["attention_step"] == (layers if backend == "cuda" else 0)


def test_norms_and_residuals_are_fused() -> None:
    seen: Counter[str] = Counter()

    def compiler(graph: GraphModule, inputs: list[torch.Tensor]) -> Any:
        fuse(graph)
        names = (str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes)
        seen.update(names)
        return graph.forward

    model = small_model()
    wina.sparsify(model, make_plan(model, 0.5), check=False)
    ids = torch.tensor([[7]], device="cuda")
    torch._dynamo.reset()
    with torch.no_grad(), phase_of(model).force("sparse"):
        wanted = model(ids, use_cache=False).logits
        step = torch.compile(model, backend=compiler, fullgraph=True)
        found = step(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    layers = model.config.num_hidden_layers
    assert (seen["fused_linears"], seen["fused_gated_mlp"]) == (2 * layers, layers)
