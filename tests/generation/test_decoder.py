import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from tests.helpers import VOCABULARY, make_model, make_plan, prompt
from wina.errors import UsageError
from wina.generation import Decoder, Sampling, generate
from wina.kernels import available_backends, decode_attention, reference
from wina.kernels.fusion import fuse
from wina.layers import lay_out_for_decode, sparsify


def of_transformers(model: PreTrainedModel, ids: torch.Tensor, count: int) -> list[list[int]]:
    found = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return found[:, ids.shape[1] :].tolist()


def decoded(decoder: Decoder, ids: torch.Tensor, count: int) -> list[list[int]]:
    decoder.prefill(ids)
    columns = [decoder.token.clone()]
    for _ in range(count - 1):
        decoder.step()
        columns.append(decoder.token.clone())
    return torch.cat(columns, 1).tolist()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_tokens_are_those_of_transformers(model: PreTrainedModel, mode: str, sparse: bool) -> None:
    if sparse:
        sparsify(model, make_plan(model, 0.4, bias=True))
        lay_out_for_decode(model)
    decoder = Decoder(model, 40, batch=2, mode=mode)
    for seed, length in ((0, 9), (1, 5)):  # the second prompt finds the first one's leavings
        ids = prompt(length, batch=2, seed=seed)
        assert decoded(decoder, ids, 20) == of_transformers(model, ids, 20)
    assert decoder.mode == mode
    if mode == "compiled":
        assert decoder._forward is not None


def test_a_window_slides_over_a_full_length_cache() -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.5,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    for length in (3, 30):  # the window fills while decoding, or was full before
        ids = prompt(length)
        assert decoded(Decoder(model, 60), ids, 24) == of_transformers(model, ids, 24)


def test_attention_with_a_soft_cap_stays_the_models_own() -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        initializer_range=0.5,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    before = model.config._attn_implementation
    ids = prompt(12)
    assert decoded(Decoder(model, 60), ids, 16) == of_transformers(model, ids, 16)
    assert model.config._attn_implementation == before


def test_layers_that_no_static_cache_fits_keep_their_own(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(9)
    wanted = of_transformers(model, ids, 12)
    monkeypatch.setattr("wina.generation.decoder.KNOWN", ())
    decoder = Decoder(model, 40, mode="compiled")
    assert decoded(decoder, ids, 12) == wanted
    assert isinstance(decoder._cache, DynamicCache)


@pytest.mark.parametrize("positions", [7, 512, 1024])
def test_attention_is_the_textbooks(positions: int) -> None:
    query, key = torch.randn(2, 6, 1, 8), torch.randn(2, 3, positions, 8)
    value, mask = torch.randn(2, 3, positions, 5), torch.rand(2, 1, 1, positions) < 0.7
    mask[..., 0] = True
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        attn_mask=mask,
        scale=0.3,
    )
    for compute in (decode_attention, reference.decode_attention):
        torch.testing.assert_close(compute(query, key, value, mask, 0.3), wanted)


def test_a_decoder_serves_many_prompts_and_seeds(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wina.generation.decoder.ROUND", 16)
    ids = prompt(9)[0].tolist()
    decoder = Decoder(model, 30, sampling=Sampling(1.0, 0.9))
    one, same, other = (
        generate(model, ids, 12, Sampling(1.0, 0.9, seed), decoder=decoder).ids
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert decoder.capacity == 32
    with pytest.raises(UsageError, match="do not fit the decoder's 32"):
        generate(model, [5] * 20, 13, decoder=decoder)


def test_what_does_not_fit_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="unknown mode 'fast'"):
        Decoder(model, 10, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one row"):
        Decoder(model, 0)
    with pytest.raises(UsageError, match=r"shape \(2, 3\) does not fit a decoder of 1 rows"):
        Decoder(model, 10).prefill(prompt(3, batch=2))


def traced(model: PreTrainedModel) -> list[str]:
    """Names of wina's operators in the fused graph of one step."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        for node in fuse(graph).graph.nodes:
            target = str(node.target)
            if target.startswith("wina.") and "dense" not in target:
                names.append(target.split(".")[1])
        return graph

    ids = prompt(1)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        step = torch.compile(lambda: model(ids, use_cache=False).logits, backend=backend)
        torch.testing.assert_close(step(), wanted, atol=1e-4, rtol=1e-4)
    return names


# Where there are compiled kernels, norms and residual sums move into wina's operators too.
ABSORBS = "cpu" in available_backends()


@pytest.mark.parametrize("bias", [False, True])
def test_what_shares_an_input_is_fused(bias: bool) -> None:
    for kind in ("qwen3", "llama"):  # llama's q, k, v, o have biases of their own
        model = make_model(kind)
        phase = sparsify(model, make_plan(model, 0.3, bias=bias))
        with phase.force("sparse"):
            names = traced(model)
        absorbed = ["fused_linears", "fused_linears", "fused_gated_mlp"]
        plain = ["sparse_linears", "sparse_linear", "sparse_gated_mlp"]
        assert names == (absorbed if ABSORBS else plain) * 2


def test_a_group_is_only_what_is_sparse() -> None:
    model = make_model("qwen3")

    def thresholds(name: str, size: int) -> torch.Tensor:
        return torch.full((size,), 0.0 if "k_proj" in name or "up_proj" in name else 0.3)

    phase = sparsify(model, make_plan(model, thresholds))
    with phase.force("sparse"):
        names = traced(model)
    last = "fused_linears" if ABSORBS else "sparse_linear"  # o and down, with the sum after each
    assert names == ["sparse_linears", last, "sparse_linear", last] * 2  # norms have other readers
