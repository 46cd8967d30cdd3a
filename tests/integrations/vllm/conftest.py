"""What the tests with an engine share: SmolLM2-135M-Instruct's real weights, and its plans."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import wina
from tests.helpers import english
from wina.models import LoadedModel, identify
from wina.plan import Plan, shipped_plan


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
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: make test-vllm")
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


@pytest.fixture(scope="session")
def prompts(served: Served) -> list[list[int]]:
    """64 prompts of 8 to 71 tokens."""
    text = english(40_000)
    ids = served.loaded.tokenizer(text, truncation=False)["input_ids"]
    starts = range(0, 64 * 80, 80)
    return [ids[start : start + 8 + index] for index, start in enumerate(starts)]


def preloads() -> str:
    """Return the libraries that vLLM's CPU builds want loaded first, where they are."""
    place = Path(importlib.util.find_spec("vllm").origin).parents[4]  # type: ignore[union-attr,arg-type]
    found = [*place.glob("lib/libiomp5.so"), *place.glob("lib/libtcmalloc_minimal.so*")]
    return ":".join([*map(str, found), *filter(None, [os.environ.get("LD_PRELOAD")])])
