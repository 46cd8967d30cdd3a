"""Each method against its own formula, on tiny models and small tensors."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import wina
from tests.bases.test_bases import model_of
from tests.helpers import Cli, english, make_tokenizer, prompt
from wina import registry
from wina.allocation import greedy_path
from wina.bases import Basis
from wina.criteria import criteria
from wina.errors import UsageError
from wina.layers import SparsityCounter, scoring
from wina.layers.linear import matrix
from wina.methods import Setting, methods, recipe
from wina.methods.probe import dropped_by_topk
from wina.methods.recipe import search_ids
from wina.methods.rsparse import factors, split
from wina.methods.wisparse import ALPHAS, HIGHEST, LOWEST, best_alpha, mutate
from wina.plan import Extras, Plan
from wina.selection import oracle_mask, random_mask, topk_mask

GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A tiny Llama and its calibration."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(english(8_000))
    model = model_of("llama")
    calibration = wina.calibrate(
        model, make_tokenizer(), text, tokens=1024, context=128, dense_prefix=4, verdict=False
    )
    return Setting(model, calibration, (0.3, 0.5))


@pytest.fixture
def setting(base: Setting) -> Iterator[Setting]:
    before = {name: x.clone() for name, x in base.model.state_dict().items()}
    yield base
    after = base.model.state_dict()
    assert all(x.equal(after[name]) for name, x in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def forward(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(prompt(24), use_cache=False).logits
    return found


def shares_of(plan: Plan) -> list[float]:
    return [x.sparsity for x in plan.document.linears.values()]


@pytest.mark.parametrize("name", list(methods))
def test_every_method_says_what_it_is_and_meets_its_target(setting: Setting, name: str) -> None:
    method = methods.get(name)
    assert method.paper
    if name == "tuned":
        with pytest.raises(UsageError, match="for this model: no sparsity"):
            method.plan(setting, 0.3)
        return
    plan = method.plan(setting, 0.3)
    assert plan.document.method == name
    extras = plan.document.extras
    assert method.basis == next((x.maker for x in extras.bases.values()), None) if extras else True
    with scoring(setting.model, plan, 4), SparsityCounter(setting.model) as counter:
        for ids in setting.calibration.windows(held_out=True):
            with torch.no_grad():
                setting.model(ids, use_cache=False)
    if name != "r-sparse":  # what its gates drop it partly reads as a low-rank term
        assert counter.sparsity == pytest.approx(0.3, abs=0.03)
    with pytest.raises(UsageError, match="above 0"):
        method.plan(setting, 0.0)


def test_wina_paper_is_transform_norms_on_k_and_gate_greedy_topk(setting: Setting) -> None:
    plan = methods.get("wina-paper").plan(setting, 0.5)
    assert plan.document.selection == "topk"
    assert plan.document.allocation == "greedy"
    assert len(set(shares_of(plan))) > 3
    for name, vector in plan.vectors.items():
        kind = name.rpartition(".")[2]
        if kind in ("k_proj", "gate_proj"):
            basis = Basis(plan.parts[f"{name}.basis"], plan.parts[f"{name}.basis_scale"])
            weight = matrix(setting.model.get_submodule(name)).detach()
            assert torch.allclose(vector, basis.rotate_weight(weight).norm(dim=0), atol=1e-5)
            # Columns of W Q are orthogonal, by falling norm.
            assert (vector.diff() <= 1e-5).all()
        else:
            assert vector.equal(torch.ones_like(vector))
    other = methods.get("teal-transform").plan(setting, 0.5)
    assert all(vector.equal(torch.ones_like(vector)) for vector in other.vectors.values())
    assert all(part.equal(other.parts[name]) for name, part in plan.parts.items())


def test_zero_columns_are_not_read(setting: Setting) -> None:
    """k_proj has 16 outputs and 32 inputs: half of its columns are zero in the svd basis."""
    plan = recipe("wina-kgate", "uniform", "topk", "svd")(setting, 0.25)
    k = "model.layers.0.self_attn.k_proj"
    with scoring(setting.model, plan, 0), SparsityCounter(setting.model) as counter:
        forward(setting.model)
    weights = {n: x.in_features * x.out_features for n, x in plan.document.linears.items()}
    assert counter.by_linear()[k] == 0.25  # the gate keeps 24 of 32, but 16 are not zero
    kept = sum(0.75 * count for count in weights.values())
    assert counter.bytes_read(1) == pytest.approx(kept - 2 * (24 - 16) * 16)


def test_larosa_is_uniform_topk_of_magnitudes_in_the_inputs_principal_components(
    setting: Setting,
) -> None:
    plan = methods.get("larosa").plan(setting, 0.5)
    assert set(shares_of(plan)) == {0.5}
    assert all(vector.equal(torch.ones_like(vector)) for vector in plan.vectors.values())
    assert plan.document.extras is not None
    assert {x.maker for x in plan.document.extras.bases.values()} == {"pca"}


def test_one_greedy_search_serves_several_targets(setting: Setting) -> None:
    statistics = setting.calibration.linears(False)
    ids = setting.calibration.windows(limit=1)[0]

    def search(*targets: float) -> Tensor:
        budgets = torch.tensor(targets, dtype=torch.float64)[:, None].repeat(1, 2)
        criterion = criteria.get("teal")
        return greedy_path(setting.model, ids, statistics, criterion, "topk", budgets, 4)

    path = search(0.2, 0.4)
    assert path[0].equal(search(0.2)[0])
    assert (path[1] >= path[0]).all()
    weights = torch.tensor([float(x.site.weights) for x in statistics], dtype=torch.float64)
    assert ((path * weights).sum(1) / weights.sum()).tolist() == pytest.approx([0.2, 0.4])


def test_cats_by_hand(setting: Setting) -> None:
    plan = methods.get("cats").plan(setting, 0.3)
    thresholds = plan.parts[f"{GATE}.output_thresholds"]
    assert thresholds.unique().numel() == 1
    mlp = setting.model.get_submodule("model.layers.0.mlp")
    x = torch.randn(2, 7, 32)
    act = torch.nn.functional.silu(mlp.gate_proj(x))
    live = act.abs() >= thresholds
    wanted = mlp.down_proj(torch.where(live, act, 0) * mlp.up_proj(x))
    dense = mlp(x)
    with scoring(setting.model, plan, 0) as phase, SparsityCounter(setting.model) as counter:
        assert torch.allclose(mlp(x), wanted, atol=1e-5)
        # Channels of down and rows of up are saved alike.
        share = 1 - float(live.float().mean())
        assert counter.by_linear()[DOWN] == pytest.approx(share)
        assert counter.weights[0] == pytest.approx(share * 14 * 2 * 32 * 48)
        with phase.force("dense"):
            assert torch.allclose(mlp(x), dense)
    assert share > 0.2


def test_cats_says_what_it_cannot_reach(setting: Setting) -> None:
    with pytest.raises(UsageError, match="cannot reach 65%"):
        methods.get("cats").plan(setting, 0.65)
    fused = replace(setting, model=model_of("phi3"))
    calibration = setting.calibration
    sites = [x for x in calibration.statistics if x.site.kind not in ("gate_proj", "up_proj")]
    fused.calibration = replace(calibration, statistics=sites)
    with pytest.raises(UsageError, match="separate gate_proj"):
        methods.get("cats").plan(fused, 0.3)


def test_rsparse_shares_one_budget(setting: Setting) -> None:
    torch.manual_seed(0)
    # Nearly low-rank, so that the term pays.
    weight = torch.randn(40, 4) @ torch.randn(4, 64) + 0.05 * torch.randn(40, 64)
    x = torch.randn(100, 64)
    u, vh = factors(weight)
    assert torch.allclose(u @ vh, weight, atol=1e-4)
    for sparsity in (0.25, 0.5, 0.65):
        found = split(x, weight, u, vh, sparsity)
        rank = len(found.into)
        assert rank > 0
        read = (1 - found.sparsity) * 64 * 40 + rank * (64 + 40)
        assert read == pytest.approx((1 - sparsity) * 64 * 40, abs=40)
        rest = dropped_by_topk(x, torch.ones(64), found.sparsity)
        lost = (rest @ weight.T - rest @ found.into.T @ found.out.T).square().sum()
        plain = (dropped_by_topk(x, torch.ones(64), sparsity) @ weight.T).square().sum()
        assert lost < plain
        # The best approximation of its rank: nothing of rank r is nearer to W (Eckart-Young).
        near = torch.linalg.svdvals(weight)[rank:].square().sum()
        missed = (weight - found.out @ found.into).square().sum()
        assert float(missed) == pytest.approx(float(near), rel=1e-3, abs=1e-6)


def test_a_low_rank_term_by_hand(setting: Setting) -> None:
    plan = methods.get("wina").plan(setting, 0.5)
    name = UP
    layer = setting.model.get_submodule(name)
    out, into = torch.randn(48, 3), torch.randn(3, 32)
    extras = Extras(low_ranks={name: 3})
    document = plan.document.model_copy(update={"schema_version": 2, "extras": extras})
    parts = {f"{name}.low_rank_in": into, f"{name}.low_rank_out": out}
    plan = replace(plan, document=document, parts=parts)
    x = torch.randn(2, 5, matrix(layer).shape[1])
    keep = plan.document.linears[name].keep
    assert keep is not None
    kept = torch.where(topk_mask(x, plan.vectors[name], keep), x, 0)
    wanted = layer(kept) + (x - kept) @ into.T @ out.T
    dense = layer(x)
    with scoring(setting.model, plan, 0) as phase:
        assert torch.allclose(layer(x), wanted, atol=1e-5)
        with phase.force("dense"):
            assert layer(x).equal(dense)


def test_searches_read_other_text_under_another_seed(setting: Setting) -> None:
    windows = setting.calibration.windows()
    count = len(windows)
    assert count == 8
    for seed in (0, 1, 5):
        found = search_ids(setting.reseeded(seed), 256)
        assert found.equal(torch.cat([windows[(2 * seed + i) % count] for i in range(2)]))
    assert len(search_ids(setting, 10**6)) == count
    assert len(search_ids(setting, 100)[0]) == 100


@pytest.mark.parametrize("name", list(methods))
def test_methods_without_a_seed_do_not_depend_on_it(setting: Setting, name: str) -> None:
    if name == "tuned":
        pytest.skip("has no plan for this model")
    short = replace(setting, search_tokens=128)
    one, other = (methods.get(name).plan(short.reseeded(seed), 0.3) for seed in (0, 1))
    if not methods.get(name).seeded:
        assert shares_of(one) == shares_of(other)
        assert all(vector.equal(other.vectors[key]) for key, vector in one.vectors.items())


def test_wisparse_alpha_is_the_best_of_the_grid() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30) * torch.rand(30).square()
    x = torch.randn(50, 30)
    norm = weight.norm(dim=0)

    def error(alpha: float) -> float:
        mask = topk_mask(x, norm**alpha, 15)
        return float((torch.where(mask, 0, x) @ weight.T).square().sum())

    found = best_alpha(norm, x, weight, 0.5)
    assert found > 0
    assert error(found) == min(error(alpha) for alpha in ALPHAS)


def test_wisparse_mutations_keep_the_budget() -> None:
    draw = random.Random(0)
    budgets = [0.5] * 6
    for _ in range(300):
        budgets = mutate(budgets, draw)
        assert sum(budgets) / 6 == pytest.approx(0.5)
        assert min(budgets) >= LOWEST - 1e-9
        assert max(budgets) <= HIGHEST + 1e-9
    assert len(set(budgets)) > 1


def lost(x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Return each token's squared error, shape (tokens,)."""
    return (torch.where(mask, 0, x) @ weight.T).square().sum(-1)


def test_the_oracle_against_every_mask_there_is() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(6, 10), torch.randn(40, 10)
    kept = torch.tensor(list(combinations(range(10), 4)))
    masks = torch.zeros(len(kept), 10, dtype=torch.bool).scatter_(1, kept, True)
    least = torch.stack([lost(x, mask, weight) for mask in masks]).min(0).values
    mask = oracle_mask(x, weight, 4, rounds=20)
    assert (mask.sum(-1) == 4).all()
    found = lost(x, mask, weight)
    assert (found >= least * 0.999).all()
    norms = lost(x, topk_mask(x, weight.norm(dim=0), 4), weight)
    assert (found <= norms * 1.001).all()
    # Most of what any mask could gain over norms.
    assert (norms - found).sum() > 0.6 * (norms - least).sum()


def test_more_rounds_of_the_oracle_do_no_harm_to_any_token() -> None:
    torch.manual_seed(2)
    common = torch.randn(64, 1)  # columns that almost cancel, which trading many at once overshoots
    weight = (common + 0.3 * torch.randn(64, 128)) * torch.rand(128)
    x = torch.randn(3, 20, 128)
    before = lost(x, topk_mask(x, weight.norm(dim=0), 64), weight)
    for rounds in (1, 2, 4, 8, 16, 32):
        after = lost(x, oracle_mask(x, weight, 64, rounds), weight)
        assert (after <= before * 1.001).all()
        before = after
    for keep in (0, 128):
        assert (oracle_mask(x, weight, keep) == (keep > 0)).all()


def test_the_oracle_beats_norms_unless_columns_are_orthogonal() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), torch.randn(64, 32)
    norms = lost(x, topk_mask(x, weight.norm(dim=0), 16), weight).sum()
    assert lost(x, oracle_mask(x, weight, 16), weight).sum() < 0.7 * norms
    orthogonal = torch.linalg.qr(torch.randn(32, 32)).Q * torch.rand(32)
    mask = topk_mask(x, orthogonal.norm(dim=0), 16)
    assert oracle_mask(x, orthogonal, 16).equal(mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_masks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4_000, 16).to(dtype)
    mask = random_mask(x, 4)
    assert (mask.sum(-1) == 4).all()
    assert mask.equal(random_mask(x, 4))
    assert mask.float().mean(0).sub(0.25).abs().max() < 0.05
    # Large inputs have no better chance.
    size = x.abs().float()
    assert float(size[mask].mean() / size.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["random", "oracle"])
def test_research_selections_are_for_scoring_alone(setting: Setting, name: str) -> None:
    plan = methods.get(name).plan(setting, 0.5)
    with pytest.raises(UsageError, match="costs more than it saves"):
        wina.sparsify(setting.model, plan, check=False)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package of one file, written as docs/methods.md says, with its entry point."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "my_package.py").write_text(next(x for x in blocks if "KEEP_FIRST" in x))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("keep-first", "my_package:KEEP_FIRST", "wina.methods")

    def found(group: str) -> list[EntryPoint]:
        return [point] * (group == "wina.methods")

    monkeypatch.setattr(registry, "entry_points", found)
    monkeypatch.setattr(methods, "_entries", dict(methods._entries))
    monkeypatch.setattr(methods, "_plugins_loaded", False)


@pytest.mark.usefixtures("outside")
def test_a_method_of_another_package(setting: Setting) -> None:
    assert "keep-first" in list(methods)
    plan = methods.get("keep-first").plan(setting, 0.5)
    assert plan.document.method == "keep-first"
    layer = setting.model.get_submodule(UP)
    x = torch.rand(5, 32) + 0.5
    wanted = layer(torch.where(torch.arange(32) < 16, x, 0))
    with scoring(setting.model, plan, 0), SparsityCounter(setting.model) as counter:
        forward(setting.model)
        assert counter.sparsity == 0.5
        assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_presets_on_the_command_line(
    cli: Cli, calibration: tuple[Path, wina.Calibration], qwen3: Path, tmp_path: Path
) -> None:
    folder = calibration[0]
    missing = cli("plan", folder, "--preset", "wina-paper", "-o", f"{tmp_path}/plan")
    assert missing.code == 2
    assert "--preset needs the model itself" in missing.said
    mixed = cli("plan", folder, "--preset", "wina-paper", "--method", "teal", "--model", qwen3)
    assert mixed.code == 2
    assert "whole method" in mixed.said
    done = cli(
        "plan", folder, "--preset", "larosa", "--model", qwen3, "-o", f"{tmp_path}/plan", "--json"
    )
    assert done.code == 0
    assert Plan.load(f"{tmp_path}/plan").document.method == "larosa"
    refused = cli("cost", qwen3, "--preset", "cats")
    assert refused.code == 2
    assert "a gate on the outputs" in refused.said


@pytest.mark.parametrize("name", ["wina-paper", "cats"])
def test_extras_compile_in_one_graph(setting: Setting, name: str) -> None:
    plan = methods.get(name).plan(setting, 0.3)
    with scoring(setting.model, plan, 0):
        wanted = forward(setting.model)
        torch._dynamo.reset()
        compiled = torch.compile(setting.model, backend="eager", fullgraph=True)
        with torch.no_grad():
            found = compiled(prompt(24), use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    torch._dynamo.reset()
