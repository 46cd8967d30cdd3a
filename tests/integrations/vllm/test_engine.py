"""vLLM itself, in processes of its own: tokens and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import make_plan, make_tokenizer
from tests.integrations.vllm.conftest import Served, needs_vllm, with_plan
from tests.integrations.vllm.engine import FLOAT32, generate
from wina.models import identify, load_model

pytestmark = needs_vllm


def same(found: list[list[int]], wanted: list[list[int]]) -> float:
    """Return the share of sequences that are equal."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


# A batch of few tokens at most, since processors without bfloat16 take minutes to warm up with it.
ROUNDING = {
    "tokens": 48,
    "batches": (1, 16),
    "enable_prefix_caching": False,
    "dtype": "bfloat16",
    "max_num_batched_tokens": 512,
}


@pytest.fixture(scope="module")
def dense(served: Served, prompts: list[list[int]]) -> dict[str, Any]:
    """What vLLM writes without wina in bfloat16."""
    return generate(served.model, prompts[:16], **ROUNDING)


def test_nothing_dropped_is_dense(
    served: Served, prompts: list[list[int]], dense: dict[str, Any]
) -> None:
    found = generate(served.model, prompts[:16], **ROUNDING, **with_plan(served.nothing))
    assert found["rounds"] == dense["rounds"]


def test_a_saved_sparse_folder_and_a_plan_are_one(
    served: Served, prompts: list[list[int]], half: dict[str, Any]
) -> None:
    found = generate(served.sparse, prompts[:16], max_num_seqs=16, **FLOAT32)
    assert found["tokens"] == half["tokens"][:16]


def test_alone_and_in_a_batch(half: dict[str, Any]) -> None:
    together, alone = half["rounds"]
    print(f"\nfloat32, alone and in a mixed batch: {same(together[: len(alone)], alone):.1%} equal")
    assert together[: len(alone)] == alone


def test_alone_and_in_a_batch_in_16_bits(
    served: Served, prompts: list[list[int]], dense: dict[str, Any]
) -> None:
    asked = {**ROUNDING, "additional_config": {"wina": {"batch_invariant": True}}}
    rounds = generate(served.model, prompts[:16], **asked, **with_plan(served.plan))["rounds"]
    found, own = same(*rounds), same(*dense["rounds"])
    print(f"\nbfloat16, alone and in a batch of 16: {found:.1%} equal; vLLM without wina {own:.1%}")
    assert found >= own


def test_chunks_and_preemptions_change_nothing(
    served: Served, prompts: list[list[int]], half: dict[str, Any]
) -> None:
    options = {**FLOAT32, **with_plan(served.plan)}
    # Blocks for nine sequences or so, and a prompt's chunk of 16 tokens beside the others.
    tight = {"num_gpu_blocks_override": 36, "max_num_batched_tokens": 32, "max_num_seqs": 16}
    asked = prompts[20:36]
    found = generate(served.model, asked, **options, **tight, block_size=32, statistics=True)
    print(f"\n{found['preemptions']} preemptions")
    assert found["preemptions"] > 0
    assert found["tokens"] == half["tokens"][20:36]


def divisible(folder: Path) -> tuple[Path, Path]:
    """Write a small random Llama of 4 heads on 2, and a plan for it with biases."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    model = load_model(str(folder / "model")).model

    def thresholds(name: str, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name))
        return torch.rand(count, generator=generator)

    identity = identify(model, "small")
    make_plan(model, thresholds, identity=identity, bias=True).save(folder / "plan")
    return folder / "model", folder / "plan"


def test_tensor_parallel(served: Served, tmp_path: Path) -> None:
    del served  # for its skip
    model, plan = divisible(tmp_path)
    prompts = [list(range(2 + i, 30 + i)) for i in range(8)]
    options = {"tokens": 32, "dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    options |= {"masks": True, **with_plan(plan)}
    one = generate(model, prompts, **options)
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    two = generate(model, prompts, **options, tensor_parallel_size=2, env=env)
    (whole,) = one["masks"]
    assert len(whole) == 8
    for name, wanted in whole.items():
        parts = [rank[name] for rank in two["masks"]]
        cut = name.endswith(("o_proj", "down_proj"))
        for projection, kept in enumerate(wanted):
            if cut:
                found = [channel for part in parts for channel in part[projection]]
            else:
                assert parts[0][projection] == parts[1][projection]
                found = parts[0][projection]
            assert found == kept, name
    assert two["tokens"] == one["tokens"]


def test_plans_that_do_not_fit(served: Served, tmp_path: Path) -> None:
    model, _ = divisible(tmp_path)
    with pytest.raises(RuntimeError, match="another architecture or size"):
        generate(model, [[2, 3]], **with_plan(served.plan), dtype="float32", max_model_len=128)
    with pytest.raises(RuntimeError, match="there is no plan at"):
        generate(served.model, [[2, 3]], **with_plan(tmp_path / "none"))
    config = {"quantization_config": {"quant_method": "wina"}}
    with pytest.raises(RuntimeError, match="wina needs a plan"):
        generate(served.model, [[2, 3]], quantization="wina", hf_overrides=config)


def test_a_checkpoint_that_lacks_vectors(served: Served, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in served.sparse.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(served.sparse / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("k_proj.thresholds"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="lacks thresholds"):
        generate(tmp_path, [[2, 3]], dtype="float32", enforce_eager=True)
