"""Rows of decoder blocks that the library runs whole, against the model's own eager step."""

import copy
from collections.abc import Sequence

import pytest
import torch
from tests.helpers import make_model, make_plan, prompt
from torch.fx import GraphModule
from transformers import PreTrainedModel

from wina.errors import UsageError
from wina.generation import Decoder, decoder
from wina.kernels import available_backends, blocks, cpu, most_likely, reference
from wina.kernels.blocks import release, run_blocks
from wina.layers import lay_out_for_decode, sparsify

if "cpu" not in available_backends():
    pytest.skip("the compiled CPU kernels were not built", allow_module_level=True)

OPS = torch.ops.wina


def logits(model: PreTrainedModel, mode: str, batch: int, steps: int = 6) -> torch.Tensor:
    made = Decoder(model, 30, batch=batch, mode=mode)
    found = []
    for seed, length in ((0, 9), (1, 4)):  # the second prompt finds the first one's leavings
        made.prefill(prompt(length, batch=batch, seed=seed))
        for _ in range(steps):
            made.step()
            found.append(made.logits.float().clone())
    assert made.mode == mode
    return torch.stack(found)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows of blocks that were found."""
    found: list[int] = []

    def spy(
        module: GraphModule, inputs: Sequence[object]
    ) -> tuple[GraphModule, list[int], list[int]]:
        graph, kept, numbers = run_blocks(module, inputs)
        found.extend(numbers)
        assert all(node.users for node in graph.graph.nodes if node.op == "placeholder")
        return graph, kept, numbers

    monkeypatch.setattr(decoder, "run_blocks", spy)
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "bias"), [("llama", False), ("llama", True), ("mistral", True)])
def test_a_step_is_the_models_own_when_compiled(
    rows: list[int], kind: str, bias: bool, dtype: torch.dtype, batch: int
) -> None:
    model = make_model(kind)
    sparsify(model, make_plan(model, 0.4, bias=bias))
    model = model.to(dtype)
    lay_out_for_decode(model)
    found = logits(model, "compiled", batch)
    assert len(rows) == 1, "all blocks are one row"
    allowed = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    wanted = logits(model, "eager", batch)
    torch.testing.assert_close(found, wanted, rtol=allowed, atol=allowed * float(wanted.std()))


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 2, 32), (3, 3, 10), (10, 2, 80)])
def test_a_row_is_its_operators(
    heads: int, shared: int, size: int, dtype: torch.dtype, isa: str
) -> None:
    batch, hidden, wide, positions, at = 2, 40, 70, 50, 33
    shapes = [(heads * size, hidden), (shared * size, hidden), (shared * size, hidden)]
    shapes += [(hidden, heads * size), (wide, hidden), (wide, hidden), (hidden, wide)]
    w = [
        cpu.input_major(normal(*shape, seed=i, dtype=dtype) / shape[1] ** 0.5)
        for i, shape in enumerate(shapes)
    ]
    thresholds = [torch.full((shape[1],), 0.1) for shape in shapes]
    norms = [normal(hidden, seed=20 + i, dtype=dtype) for i in range(2)]
    cache = [normal(batch, shared, positions, size, seed=30 + i, dtype=dtype) for i in range(2)]
    mine, length = [one.clone() for one in cache], torch.tensor(at)
    x = normal(batch, 1, hidden, seed=40, dtype=dtype)
    cos, sin = (normal(1, 1, size, seed=50 + i, dtype=dtype) for i in range(2))
    mask = (torch.arange(positions) <= at).expand(batch, 1, 1, -1)
    number, scale = 1_000_000, size**-0.5
    try:
        with cpu.use_instruction_set(isa):
            OPS.add_block(
                number, norms[:1], 1e-5, w[:3], thresholds[:3], [], [*mine, length], scale,
                w[3:4], thresholds[3:4], [], norms[1:], 1e-5, w[4:], thresholds[4:], "silu", [],
            )  # fmt: skip
            found = OPS.decode_blocks(x, cos, sin, mask, number)
    except UsageError as error:
        pytest.skip(str(error))
    finally:
        blocks.library.free_blocks(number)
    q, k, v = reference.fused_linears(x, norms[0], 1e-5, w[:3], thresholds[:3])
    q, k, v = (y.view(batch, 1, -1, size).transpose(1, 2) for y in (q, k, v))
    cache[0][:, :, at] = turned(k, cos[:, None], sin[:, None])[:, :, 0]
    cache[1][:, :, at] = v[:, :, 0]
    mixed = reference.decode_attention(
        turned(q, cos[:, None], sin[:, None]), *cache, mask, scale
    ).transpose(1, 2)
    (y,) = reference.fused_linears(
        mixed.reshape(batch, 1, -1), None, 0.0, w[3:4], thresholds[3:4], residual=x
    )
    wanted = reference.fused_gated_mlp(y, norms[1], 1e-5, w[4:], thresholds[4:], "silu", residual=y)
    # A channel near its threshold may be dropped on one side alone: 0.1 at most.
    allowed = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(found, wanted, rtol=allowed, atol=allowed)
    for one, two in zip(mine, cache, strict=True):
        torch.testing.assert_close(one, two, rtol=allowed, atol=allowed)
    assert int(length) == at + 1


def test_other_blocks_stay_as_they_are_when_compiled(rows: list[int]) -> None:
    for kind in ("qwen3", "gpt2"):  # norms of heads; another block altogether
        model = make_model(kind)
        sparsify(model, make_plan(model, 0.4))
        lay_out_for_decode(model)
        torch.testing.assert_close(
            logits(model, "compiled", 1), logits(model, "eager", 1), rtol=1e-4, atol=1e-4
        )
    assert rows == []


def test_dense_layers_break_a_row_when_compiled(rows: list[int]) -> None:
    model = make_model("llama")
    plan = make_plan(model, 0.4)
    sparsify(model, plan)
    wanted = copy.deepcopy(model)
    down = model.model.layers[0].mlp.down_proj
    down.vector.zero_()
    down.active = False
    wanted.model.layers[0].mlp.down_proj.vector.zero_()
    lay_out_for_decode(model)
    found = logits(model, "compiled", 1)
    assert len(rows) == 1, "the other blocks are still run whole"
    torch.testing.assert_close(found, logits(wanted, "eager", 1), rtol=1e-4, atol=1e-4)


def test_blocks_are_forgotten_with_their_owner_when_compiled(rows: list[int]) -> None:
    model = make_model("llama")
    sparsify(model, make_plan(model, 0.4))
    made = Decoder(model, 20, mode="compiled")
    lay_out_for_decode(model)
    made.prefill(prompt(4))
    made.step()
    size = model.config.hidden_size // model.config.num_attention_heads
    x, turn = torch.zeros(1, 1, model.config.hidden_size), torch.ones(1, 1, size)
    mask = torch.zeros(1, 1, 1, made.capacity, dtype=torch.bool)
    torch.ops.wina.decode_blocks(x, turn, turn, mask, rows[0])
    made._forward = None
    with pytest.raises(RuntimeError, match="no such run"):
        torch.ops.wina.decode_blocks(x, turn, turn, mask, rows[0])


def test_wrong_arguments_are_refused_when_compiled(rows: list[int]) -> None:
    model = make_model("llama")
    sparsify(model, make_plan(model, 0.4))
    lay_out_for_decode(model)
    made = Decoder(model, 20, mode="compiled")
    made.prefill(prompt(4))
    made.step()
    size = model.config.hidden_size // model.config.num_attention_heads
    x, turn = torch.zeros(1, 1, model.config.hidden_size), torch.ones(1, 1, size)
    mask = torch.zeros(1, 1, 1, made.capacity, dtype=torch.bool)
    run = torch.ops.wina.decode_blocks
    for bad in (
        (x[0], turn, turn, mask, rows[0]),
        (x, turn[..., :-1], turn, mask, rows[0]),
        (x, turn, turn.double(), mask, rows[0]),
        (x, turn, turn, mask[..., :-1], rows[0]),
        (x, turn, turn, mask.float(), rows[0]),
        (x[..., :-1], turn, turn, mask, rows[0]),
    ):
        with pytest.raises(RuntimeError, match="wina: "):
            run(*bad)


def test_an_owner_that_lives_keeps_its_blocks() -> None:
    def owner() -> None: ...

    release(owner, [12345])  # a number that was never used
    assert blocks.library.free_blocks(54321) is None
    del owner


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 32, 33, 1000])
def test_the_most_likely_is_argmax(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(4, size, generator=generator).to(dtype)
    assert torch.equal(most_likely(values), values.argmax(-1))
    values[:, size // 2] = values.max()  # the first of equals
    values[:, -1] = values.max()
    assert torch.equal(most_likely(values), values.argmax(-1))
    values[1] = float("-inf")
    values[2, size // 3] = float("nan")
    assert torch.equal(most_likely(values), values.argmax(-1))
