"""What the tests with an engine share: SmolLM2-135M-Instruct's real weights, and its plans."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wina
from tests.helpers import english
from tests.integrations.vllm.engine import FLOAT32, generate
from wina.integrations.vllm.serve import overrides
from wina.models import LoadedModel, identify
from wina.plan import Plan, shipped_plan

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"
)


@dataclass(frozen=True)
class Served:
    """A model, with its folders: dense, of a plan at 50 %, of one that drops nothing, sparse."""

    loaded: LoadedModel
    model: Path
    plan: Path
    nothing: Path
    sparse: Path


def _nothing(plan: Plan) -> Plan:
    linears = {x: y.model_copy(update={"bias": False}) for x, y in plan.document.linears.items()}
    return replace(
        plan,
        document=plan.document.model_copy(update={"linears": linears}),
        vectors={name: torch.zeros_like(vector) for name, vector in plan.vectors.items()},
        biases={},
    )


@pytest.fixture(scope="session")
def served(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded model in float32, in folders; ``loaded`` is sparse at 50 %."""
    folder = tmp_path_factory.mktemp("served")
    plan = shipped_plan(identify(demo.model, demo.name), 0.5)
    plan.save(folder / "plan")
    _nothing(plan).save(folder / "nothing")
    for name in ("model", "sparse"):
        demo.model.save_pretrained(folder / name)
        demo.tokenizer.save_pretrained(folder / name)
        if name == "model":
            wina.sparsify(demo.model, plan)
    yield Served(demo, *(folder / name for name in ("model", "plan", "nothing", "sparse")))
    wina.densify(demo.model)


QUESTIONS = [f"Tell me {number} facts about the sea." for number in range(2, 14)]


def with_plan(plan: Path) -> dict[str, Any]:
    """Return vLLM's options for a plan."""
    return {"quantization": "wina", "hf_overrides": overrides(str(plan))}


@pytest.fixture(scope="session")
def half(served: Served, prompts: list[list[int]], chats: list[list[int]]) -> dict[str, Any]:
    """What the engine writes in float32 at 50 %, 16 requests at once; then some one by one."""
    asked = [*prompts, *chats]
    options: dict[str, Any] = {**FLOAT32, "max_num_seqs": 16}
    batches = (len(asked), 1)
    options |= {"later": 24, **with_plan(served.plan)}
    return generate(served.model, asked, batches=batches, **options)


@pytest.fixture(scope="session")
def chats(served: Served) -> list[list[int]]:
    """The QUESTIONS as a chat's prompts, in ids."""
    tokenizer = served.loaded.tokenizer
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="session")
def prompts(served: Served) -> list[list[int]]:
    """64 prompts of 8 to 71 tokens."""
    text = english(40_000)
    ids = served.loaded.tokenizer(text, truncation=False)["input_ids"]
    starts = range(0, 64 * 80, 80)
    return [ids[start : start + 8 + index] for index, start in enumerate(starts)]


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM's config of one rank, as the layers of a model in this process want it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    config = VllmConfig()
    place = tmp_path_factory.mktemp("rendezvous") / "file"
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():  # once a process
            init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
            initialize_model_parallel()
        yield config


@pytest.fixture
def ranks(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes vLLM's layers believe in being one of several ranks."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def be(rank: int, size: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    return be
