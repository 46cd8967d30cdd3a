import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tests.helpers import prompt
from tests.layers.test_swap import assert_same, fingerprint
from wina.calibration.collect import (
    Sums,
    add_gradients,
    add_scores,
    collectable,
    column_norms,
    gradient_checkpointed,
    gradient_rms,
    to_statistics,
)
from wina.criteria import LinearFacts
from wina.errors import WinaError
from wina.layers.linear import matrix
from wina.models import Site, find_sites
from wina.statistics import histogram

SKIP = 3


def inputs_and_gradients(
    model: PreTrainedModel, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return x and dL/dx through each linear alone, by autograd on the outputs: W^T dL/dy."""
    sites = find_sites(model, include_head=True)
    inputs, outputs = {}, {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def keep(_module, args, output):  # type: ignore[no-untyped-def]
            inputs[name], outputs[name] = args[0].detach(), output

        return keep

    handles = [model.get_submodule(s.name).register_forward_hook(hook(s.name)) for s in sites]
    logits = model(ids).logits[0, SKIP:-1]
    loss = functional.cross_entropy(logits, ids[0, SKIP + 1 :], reduction="sum")
    found = torch.autograd.grad(loss, list(outputs.values()))
    for handle in handles:
        handle.remove()
    gradients = {
        name: gradient @ matrix(model.get_submodule(name))
        for (name, _), gradient in zip(outputs.items(), found, strict=True)
    }
    return inputs, gradients


def test_gradients_are_those_through_each_linear_alone(each_model: PreTrainedModel) -> None:
    sites = find_sites(each_model, include_head=True)
    windows = [prompt(16, seed=seed) for seed in (1, 2)]
    seen = [inputs_and_gradients(each_model, ids) for ids in windows]
    before = fingerprint(each_model)
    sums: Sums = {}
    with gradient_checkpointed(each_model):
        for ids in windows:
            add_gradients(each_model, sites, ids, SKIP, sums)
    tokens = 2 * (16 - SKIP)
    assert sums["tokens/gradient"] == tokens
    for site in sites:
        x = torch.cat([inputs[site.name][0, SKIP:] for inputs, _ in seen]).square()
        g = torch.cat([gradients[site.name][0, SKIP:] for _, gradients in seen]).square()
        rms = gradient_rms([site], sums)[site.name]
        assert rms is not None
        expected = ((x * g).sum(0) / x.sum(0)).sqrt()
        torch.testing.assert_close(rms, expected, rtol=2e-3, atol=1e-6)
        assert rms.dtype == torch.float32
    assert_same(fingerprint(each_model), before)


def test_gradients_weigh_as_much_as_their_inputs() -> None:
    """A token with a huge gradient and no input costs nothing when its input is dropped."""
    site = Site("x", "x", 0, 2, 1)
    x = torch.tensor([[1.0, 1.0], [1e-4, 1.0]]).repeat(500, 1)
    g = torch.tensor([[1.0, 1.0], [1e3, 1e3]]).repeat(500, 1)
    sums: Sums = {
        "gradient/x": g.square().sum(0),
        "cost/x": (x * g).square().sum(0),
        "power/x": x.square().sum(0),
        "tokens/gradient": torch.tensor(1000),
    }
    rms = gradient_rms([site], sums)[site.name]
    assert rms is not None
    cost = x.square().mean(0) * rms.square()
    torch.testing.assert_close(cost, (x * g).square().mean(0), rtol=0.01, atol=0)


def test_a_channel_without_input_has_its_plain_gradient() -> None:
    site = Site("x", "x", 0, 2, 1)
    sums: Sums = {
        "gradient/x": torch.tensor([40.0, 40.0]),
        "cost/x": torch.tensor([0.0, 90.0]),
        "power/x": torch.tensor([0.0, 10.0]),
        "tokens/gradient": torch.tensor(10),
    }
    rms = gradient_rms([site], sums)[site.name]
    assert rms is not None
    torch.testing.assert_close(rms, torch.tensor([2.0, 3.0]))


def test_gradients_leave_the_model_as_it_was(each_model: PreTrainedModel) -> None:
    each_model.lm_head.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in each_model.named_parameters()}
    sites = find_sites(each_model)
    with gradient_checkpointed(each_model):
        add_gradients(each_model, sites, prompt(12), SKIP, {})
        assert not any(p.requires_grad for p in each_model.parameters())
    assert {name: p.requires_grad for name, p in each_model.named_parameters()} == wanted
    assert all(p.grad is None for p in each_model.parameters())
    assert not any(module.training for module in each_model.modules())


def test_scores_are_histograms_of_what_goes_in(each_model: PreTrainedModel) -> None:
    sites = find_sites(each_model, include_head=True)
    norms = column_norms(each_model, sites)
    scales = {
        criterion.name: {s.name: criterion.scale(LinearFacts(s.kind, norms[s.name])) for s in sites}
        for criterion in collectable(with_gradient=False)
    }
    assert sorted(scales) == ["teal", "wina", "wina-kgate"]
    windows = [prompt(16, seed=seed) for seed in (1, 2)]
    sums: Sums = {}
    for ids in windows:
        add_scores(each_model, sites, scales, ids, SKIP, sums)
    seen = [inputs_and_gradients(each_model, ids)[0] for ids in windows]
    for linear in to_statistics(sites, norms, sums):
        name = linear.site.name
        x = torch.cat([inputs[name][0, SKIP:] for inputs in seen])
        torch.testing.assert_close(linear.mean_square, x.square().mean(0))
        weight = matrix(each_model.get_submodule(name))
        torch.testing.assert_close(linear.column_norm, weight.norm(dim=0))
        assert linear.gradient_rms is None
        for criterion, counts in linear.histograms.items():
            assert torch.equal(counts, histogram(x.abs() * scales[criterion][name]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(model: PreTrainedModel, value: float) -> None:
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = value
    sites = find_sites(model)
    with pytest.raises(WinaError, match=r"model\.layers\.0\.mlp\.down_proj holds NaN"):
        add_scores(model, sites, {}, prompt(8), 0, {})


def test_loss_is_collected_only_with_gradients() -> None:
    assert "loss" in [criterion.name for criterion in collectable(with_gradient=True)]
    assert "loss" not in [criterion.name for criterion in collectable(with_gradient=False)]


def test_blocks_are_checkpointed_one_at_a_time(model: PreTrainedModel) -> None:
    runs = []
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    with gradient_checkpointed(model):
        add_gradients(model, find_sites(model), prompt(12), SKIP, {})
    assert len(runs) == 2  # forward, and again for the backward pass
