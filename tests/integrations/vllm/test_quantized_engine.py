"""vLLM itself on checkpoints of compressed-tensors, in processes of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import wina
from tests.integrations.compressed import integers, write
from tests.integrations.vllm import reference
from tests.integrations.vllm.conftest import Served, needs_vllm, with_plan
from tests.integrations.vllm.engine import FLOAT32, Forced, generate
from tests.integrations.vllm.test_against_transformers import Said
from tests.integrations.vllm.test_engine import divisible
from wina.models import load_model
from wina.plan import Plan

pytestmark = needs_vllm
TEXTS, ALONE, STEPS = 16, 6, 8
# vLLM computes with packed weights on a CPU in 16 bits alone.
BFLOAT16 = {**FLOAT32, "dtype": "bfloat16", "max_num_batched_tokens": 512}
BFLOAT16 |= {"additional_config": {"wina": {"batch_invariant": True}}, "max_num_seqs": TEXTS}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def packed(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, its linears rounded to 4 bits in groups of 32."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    write(load_model(str(served.model)).model.float(), folder, integers(4, 32))
    served.loaded.tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Compared:
    """What Transformers says at 50 %, sparse from the first token after each prompt on."""

    answers: list[list[int]]
    exact: Said  # in float32
    control: Said  # in bfloat16, as vLLM


@pytest.fixture(scope="module")
def transformers(packed: Path, served: Served, prompts: list[list[int]]) -> Compared:
    found: list[Said] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load(packed, dtype)
        wina.sparsify(model, Plan.load(served.plan), check=False)
        ends = [reference.prefill(model, ids) for ids in prompts[:TEXTS]]
        logits, caches = torch.stack([x[-1] for x, _ in ends]), [cache for _, cache in ends]
        forced = found[0].best if found else None
        best, kept = reference.decode(model, caches, logits, forced, STEPS + 1)
        found.append(Said(best, kept.float()))
    return Compared(found[0].best.tolist(), *found)


@pytest.fixture(scope="module")
def half(
    packed: Path,
    served: Served,
    prompts: list[list[int]],
    transformers: Compared,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Said]:
    """What the engine writes at 50 %, and what it says where Transformers' tokens are forced."""
    file = tmp_path_factory.mktemp("kept") / "kept"
    asked = prompts[:TEXTS]
    options: dict[str, Any] = {**BFLOAT16, **with_plan(served.plan)}
    options |= {"tokens": 40, "batches": (TEXTS, 1), "later": ALONE}
    forced = [Forced(asked, transformers.answers)]
    found = generate(packed, asked, forced=forced, keep=str(file), **options)
    (said,) = torch.load(file)["said"]
    return found, Said(*said)


def test_positions_are_transformers(half: Any, transformers: Compared) -> None:
    """As near to float32 as Transformers' own bfloat16, at dense and at sparse positions."""
    exact, control = transformers.exact, transformers.control
    ours, theirs = half[1].apart(exact), control.apart(exact)
    for name, said, apart in (("vLLM", half[1], ours), ("Transformers", control, theirs)):
        dense, first, rest = (apart[:, x].median() for x in (0, 1, slice(2, None)))
        print(
            f"\nW4A16 at 50 %, {name} in bfloat16 beside float32: logits apart by {dense:.2f} at "
            f"dense positions, {first:.2f} at first sparse ones, {rest:.2f} later; the same best "
            f"token at {said.agree(exact):.1%} of {theirs[:, 1:].numel()} sparse positions",
            end="",
        )
    for place in (0, 1, slice(2, None)):
        assert float(ours[:, place].median()) < 1.5 * float(theirs[:, place].median())
    assert half[1].agree(exact) > control.agree(exact) - 0.1


def test_alone_and_in_a_batch(half: Any) -> None:
    together, alone = half[0]["rounds"]
    assert len(alone) == ALONE
    assert together[:ALONE] == alone


def test_nothing_dropped_is_dense(
    packed: Path, served: Served, prompts: list[list[int]], half: Any
) -> None:
    """Compiled; and the plan at 50 % was one that drops something."""
    options: dict[str, Any] = {"dtype": "bfloat16", "max_num_batched_tokens": 512, "tokens": 40}
    dense = generate(packed, prompts[:8], **options)
    found = generate(packed, prompts[:8], **options, **with_plan(served.nothing))
    assert found["tokens"] == dense["tokens"]
    assert found["tokens"] != half[0]["tokens"][:8]


def test_a_saved_sparse_folder_and_a_plan_are_one(
    packed: Path, served: Served, prompts: list[list[int]], half: Any, tmp_path: Path
) -> None:
    model = load(packed)
    wina.sparsify(model, Plan.load(served.plan), check=False)
    model.save_pretrained(tmp_path / "unpacked")  # as Transformers computes with them
    model.hf_quantizer.compressor.compress_model(model)
    model.save_pretrained(tmp_path / "sparse")
    for name in ("unpacked", "sparse"):
        served.loaded.tokenizer.save_pretrained(tmp_path / name)
    found = generate(tmp_path / "sparse", prompts[:TEXTS], tokens=40, **BFLOAT16)
    assert found["tokens"] == half[0]["tokens"]
    with pytest.raises(RuntimeError, match="compress_model"):
        generate(tmp_path / "unpacked", prompts[:1], **BFLOAT16)


def small(folder: Path) -> tuple[Path, Path]:
    """Return a small compressed model's folder, and a plan's for it."""
    model, plan = divisible(folder)
    write(load_model(str(model)).model.float(), folder / "packed", integers(4, 32, False))
    for file in model.glob("token*"):
        shutil.copy(file, folder / "packed")
    return folder / "packed", plan


def test_tensor_parallel_and_compiled(served: Served, tmp_path: Path) -> None:
    """Zero points, too."""
    del served  # for its skip
    model, plan = small(tmp_path)
    prompts = [list(range(2 + i, 30 + i)) for i in range(8)]
    options: dict[str, Any] = {
        "tokens": 32,
        "dtype": "bfloat16",
        "max_model_len": 128,
        **with_plan(plan),
    }
    one = generate(model, prompts, **options, masks=True, enforce_eager=True)
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    two = generate(
        model, prompts, **options, masks=True, enforce_eager=True, tensor_parallel_size=2, env=env
    )
    (whole,) = one["masks"]
    assert len(whole) == 8
    for name, wanted in whole.items():
        parts = [rank[name] for rank in two["masks"]]
        cut = name.endswith(("o_proj", "down_proj"))
        for projection, kept in enumerate(wanted):
            each = [part[projection] for part in parts]
            assert kept == (each[0] + each[1] if cut else each[0]), name
    compiled = generate(model, prompts, **options)
    # Of random weights in 16 bits: rounding soon leads texts apart, the first tokens seldom.
    for name, found in (("two ranks", two), ("compiled", compiled)):
        pairs = list(zip(found["tokens"], one["tokens"], strict=True))
        same = [sum(a[:count] == b[:count] for a, b in pairs) for count in (1, 2, 3)]
        print(f"\n{name}: the first 1, 2, 3 tokens are the same in {same} of {len(pairs)} texts")
        assert same[0] >= 6
        assert same[1] >= 4


def test_a_plan_of_another_model(packed: Path, served: Served, tmp_path: Path) -> None:
    model, plan = small(tmp_path)
    with pytest.raises(RuntimeError, match="another architecture or size"):
        generate(model, [[2, 3]], **with_plan(served.plan), dtype="bfloat16", max_model_len=128)
    with pytest.raises(RuntimeError, match="another architecture or size"):
        generate(packed, [[2, 3]], **with_plan(plan), dtype="bfloat16", max_model_len=128)
