from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import wina
from tests import families
from tests.helpers import Cli, make_plan, prompt
from wina.calibration.collect import add_gradients, add_scores, gradient_checkpointed
from wina.models import find_sites
from wina.statistics import histogram

SKIP = 3


@pytest.fixture
def mixtral() -> PreTrainedModel:
    return families.make(families.EXPERTS[0])


def reference(model: PreTrainedModel, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and dL/dx of each expert's projections on the positions that count, one by one."""
    seen: dict[str, list[tuple[Tensor, bool]]] = {}

    def forward(module, name, hidden, index, weights):  # type: ignore[no-untyped-def]
        out = [torch.zeros_like(hidden[0]) for _ in hidden]
        for position, x in enumerate(hidden):
            for expert, weight in zip(index[position].tolist(), weights[position], strict=True):
                y = x
                for projection in ("gate_up_proj", "down_proj"):
                    y = y.clone()
                    y.retain_grad()
                    key = f"{name}.{expert}.{projection}"
                    seen.setdefault(key, []).append((y, position >= SKIP))
                    y = getattr(module, projection)[expert] @ y
                    if projection == "gate_up_proj":
                        gate, up = y.chunk(2)
                        y = module.act_fn(gate) * up
                out[position] = out[position] + weight * y
        return torch.stack(out)

    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.forward = lambda *args, m=module, n=name: forward(m, n, *args)
    logits = model(ids, use_cache=False).logits[0, SKIP:-1]
    functional.cross_entropy(logits, ids[0, SKIP + 1 :], reduction="sum").backward()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return {
        name: (
            torch.stack([x.detach() for x, counts in rows if counts]),
            torch.stack([x.grad for x, counts in rows if counts]),
        )
        for name, rows in seen.items()
        if any(counts for _, counts in rows)
    }


def test_sums_of_experts_are_of_the_tokens_routed_to_them(mixtral: PreTrainedModel) -> None:
    ids = prompt(20)
    wanted = reference(mixtral, ids)
    sites = find_sites(mixtral)
    sums: dict[str, Tensor] = {}
    with gradient_checkpointed(mixtral):
        add_gradients(mixtral, sites, ids, SKIP, sums)
    scales = {"teal": {site.name: torch.ones(site.in_features) for site in sites}}
    add_scores(mixtral, sites, scales, ids, SKIP, sums)
    routed = 0
    for site in sites:
        if site.expert is None:
            continue
        if site.name not in wanted:
            assert int(sums.get(f"rows/scores/{site.name}", torch.tensor(0))) == 0
            continue
        x, gradient = wanted[site.name]
        assert int(sums[f"rows/scores/{site.name}"]) == len(x)
        assert int(sums[f"rows/gradient/{site.name}"]) == len(x)
        routed += len(x)
        square = gradient.double().square().sum(0)
        torch.testing.assert_close(sums[f"gradient/{site.name}"], square, rtol=1e-3, atol=1e-6)
        square = x.double().square().sum(0)
        torch.testing.assert_close(sums[f"square/{site.name}"], square, rtol=1e-4, atol=1e-6)
        moved = (sums[f"scores/teal/{site.name}"] - histogram(x.abs())).abs().sum()
        assert moved <= 0.02 * x.numel()  # rounding at the edges of bins
    assert routed == 2 * 2 * 2 * (20 - SKIP)  # layers, projections, experts of a token, positions


def test_usage_weighs_the_global_allocation(
    mixtral: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    settings = {"tokens": 768, "context": 128, "dense_prefix": 4}
    made = wina.calibrate(mixtral, tokenizer, text, verdict=False, **settings)
    made.save(tmp_path / "calibration")
    found = wina.Calibration.load(tmp_path / "calibration")
    for linear in found.statistics:
        before = next(x for x in made.statistics if x.site == linear.site)
        assert linear.usage == before.usage
    by_layer = [0.0, 0.0]
    for linear in found.linears(False):
        if linear.site.expert is None:
            assert linear.usage == 1.0
        elif linear.site.kind == "down_proj":
            by_layer[linear.site.block or 0] += linear.usage
    assert by_layer == pytest.approx([2.0, 2.0])  # experts of a token
    plan = found.plan(0.5, "loss", "global")
    linears = plan.document.linears.values()
    total = sum(x.in_features * x.out_features * x.usage for x in linears)
    dropped = sum(x.in_features * x.out_features * x.usage * x.sparsity for x in linears)
    assert dropped / total == pytest.approx(0.5, abs=1e-6)
    assert plan.sparsity == pytest.approx(0.5, abs=1e-6)
    assert {x.usage for x in linears} != {1.0}


def test_inspect_shows_a_blocks_experts_together(
    mixtral: PreTrainedModel, tmp_path: Path, cli: Cli
) -> None:
    plan = make_plan(mixtral, 0.5)
    linears = dict(plan.document.linears)
    for name, linear in linears.items():
        if ".experts." in name:
            expert = int(name.split(".")[-2])
            update = {"usage": (expert + 1) / 10.5, "sparsity": expert / 10}
            linears[name] = linear.model_copy(update=update)
    document = plan.document.model_copy(update={"linears": linears})
    replace(plan, document=document).save(tmp_path / "plan")
    shown = cli("inspect", tmp_path / "plan").out
    # sum of (e + 1) e / 10 over sum of e + 1, e from 0 to 5
    assert shown.count("0.33") == 4
    assert "each sees 9.5% to 57.1% of the tokens" in shown


def test_experts_that_saw_little_are_reported(
    mixtral: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for block in mixtral.model.layers:
        router = block.mlp.gate.weight.data
        # Of each of these pairs one logit is above the zero of expert 5, which two others beat.
        router[1], router[3], router[5] = -router[0], -router[2], 0
    settings = {"tokens": 768, "context": 128, "dense_prefix": 4}
    made = wina.calibrate(mixtral, tokenizer, text, verdict=False, **settings)
    said = capsys.readouterr().err
    unseen = [x for x in made.statistics if x.usage == 0]
    assert {x.site.expert for x in unseen} == {5}
    assert "experts saw fewer than 32" in " ".join(said.split())
    assert all(int(x.histograms["wina"].sum()) > 0 for x in made.statistics)
    assert all(bool(x.mean_square.gt(0).any()) for x in made.statistics)
