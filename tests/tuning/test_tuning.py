import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import wina
from tests.helpers import Cli
from wina.calibration import Calibration, make_plan
from wina.errors import UsageError
from wina.layers import sparse_layers
from wina.measures import score_plan
from wina.models import load_model
from wina.plan import Plan
from wina.tuning import TuningSettings, interpolate, tune
from wina.tuning import run as tuning
from wina.tuning.gate import GateState, StraightThrough
from wina.tuning.passes import Pass

Calibrated = tuple[Path, Calibration]
FAST = TuningSettings(steps=12, batch=2, rate=0.05, evaluations=3)


@pytest.fixture
def loaded(qwen3: Path) -> PreTrainedModel:
    return load_model(str(qwen3)).model


@pytest.fixture
def start(calibration: Calibrated, loaded: PreTrainedModel) -> Plan:
    return make_plan(calibration[1], 0.5, "wina", "uniform", model=loaded, refine=True)


def state_for(positions: int, channels: int, dense_prefix: int = 0) -> GateState:
    rows = torch.arange(positions) >= dense_prefix
    return GateState(rows, 0.3, torch.zeros(1), torch.zeros(channels))


def test_gate_forward_is_the_run_time_rule() -> None:
    x = torch.tensor([[[0.1, -2.0, 0.5], [0.4, 0.6, float("nan")]]])
    log_t = torch.tensor([0.5, 1.0, 0.5]).log()
    out = StraightThrough.apply(x, log_t, state_for(2, 3), 0, 0)
    wanted = torch.tensor([[[0.0, -2.0, 0.5], [0.0, 0.0, float("nan")]]])
    assert torch.equal(out.nan_to_num(9), wanted.nan_to_num(9))


def test_gate_backward_is_the_gradient_of_the_soft_gate() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7)
    gradient = torch.randn(2, 5, 7)
    log_t = torch.randn(7).mul(0.3).requires_grad_()
    state = state_for(5, 7, dense_prefix=2)
    StraightThrough.apply(x, log_t, state, 0, 0).backward(gradient)
    found = log_t.grad
    soft_t = log_t.detach().clone().requires_grad_()
    soft = torch.sigmoid((x.abs().log() - soft_t) / 0.3)[:, 2:]
    (soft * x[:, 2:] * gradient[:, 2:]).sum().backward()
    torch.testing.assert_close(found, soft_t.grad)
    # Counted beside it: what was dropped, and how fast the soft count grows with log t.
    below = x.abs()[:, 2:] < log_t.exp()
    assert int(state.dropped[0]) == int(below.sum())
    (again,) = torch.autograd.grad(
        (1 - torch.sigmoid((x.abs().log() - soft_t) / 0.3)[:, 2:]).sum(), soft_t
    )
    torch.testing.assert_close(state.density, again)


def test_gate_gives_x_the_gradient_of_what_stayed() -> None:
    x = torch.tensor([[[0.1, 2.0]]], requires_grad=True)
    log_t = torch.zeros(2)
    StraightThrough.apply(x, log_t, state_for(1, 2), 0, 0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[0.0, 1.0]]]


def test_tuning_lowers_the_held_out_kl_at_the_same_sparsity(
    calibration: Calibrated, loaded: PreTrainedModel, start: Plan
) -> None:
    made = calibration[1]
    windows, skip = made.windows(held_out=True), made.document.dense_prefix
    before, _ = score_plan(loaded, start, windows, skip, "")
    tuned = tune(loaded, made, start, replace(FAST, steps=40))
    after, counter = score_plan(loaded, tuned, windows, skip, "")
    assert after.kl < 0.9 * before.kl
    assert counter.sparsity == pytest.approx(0.5, abs=0.005)
    assert tuned.document.realized_sparsity == counter.sparsity
    assert tuned.document.method == "tuned"
    assert tuned.sparsity == pytest.approx(counter.sparsity, abs=1e-6)


def test_the_model_is_left_as_it_was(
    calibration: Calibrated, loaded: PreTrainedModel, start: Plan
) -> None:
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    needs = {name: p.requires_grad for name, p in loaded.named_parameters()}
    tune(loaded, calibration[1], start, replace(FAST, steps=2))
    assert before.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert needs == {name: p.requires_grad for name, p in loaded.named_parameters()}
    assert not any(module.training for module in loaded.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in loaded.modules())


def test_checkpointing_changes_memory_only(
    calibration: Calibrated, loaded: PreTrainedModel, start: Plan
) -> None:
    one, other = (
        tune(loaded, calibration[1], start, replace(FAST, steps=3, checkpointing=checkpointing))
        for checkpointing in (True, False)
    )
    for name, vector in one.vectors.items():
        torch.testing.assert_close(vector, other.vectors[name])


def test_interrupted_tuning_goes_on_to_the_same_plan(
    calibration: Calibrated,
    loaded: PreTrainedModel,
    start: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = tune(loaded, calibration[1], start, FAST)
    take, taken = tuning._Tuner._take_step, []

    def interrupted(self: tuning._Tuner, distill: Pass) -> tuple[float, float]:
        if len(taken) == 7:
            raise KeyboardInterrupt
        taken.append(1)
        return take(self, distill)

    monkeypatch.setattr(tuning._Tuner, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(loaded, calibration[1], start, FAST, output=tmp_path / "plan")
    monkeypatch.setattr(tuning._Tuner, "_take_step", take)
    assert (tmp_path / "plan.partial" / tuning.STATE).exists()
    found = tune(loaded, calibration[1], start, FAST, output=tmp_path / "plan")
    assert not (tmp_path / "plan.partial").exists()
    for name, vector in wanted.vectors.items():
        assert torch.equal(vector, found.vectors[name])
        assert torch.equal(wanted.biases[name], found.biases[name])


def test_biases_are_added_on_sparse_positions_only(
    calibration: Calibrated, loaded: PreTrainedModel, start: Plan, tmp_path: Path
) -> None:
    tuned = tune(loaded, calibration[1], start, FAST)
    assert any(bool(bias.any()) for bias in tuned.biases.values())
    again = Plan.load(tuned.save(tmp_path / "plan"))
    assert all(torch.equal(bias, again.biases[name]) for name, bias in tuned.biases.items())
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        dense = loaded(ids).logits
        wina.sparsify(loaded, again)
        assert torch.equal(loaded(ids).logits, dense)
        for name, layer in sparse_layers(loaded):
            x = torch.randn(1, 3, layer.vector.numel())
            layer.phase.rows = True
            plain = torch.nn.functional.linear(
                torch.where(x.abs() < again.vectors[name], 0, x), layer.weight
            )
            torch.testing.assert_close(layer(x), plain + again.biases[name])
            layer.phase.rows = torch.tensor([False, True, True])
            mixed = layer(x)
            torch.testing.assert_close(mixed[:, 1:], (plain + again.biases[name])[:, 1:])
            torch.testing.assert_close(mixed[:, :1], (x @ layer.weight.T)[:, :1])
    wina.densify(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, dense)


def test_without_biases_only_thresholds_change(
    calibration: Calibrated, loaded: PreTrainedModel, start: Plan
) -> None:
    tuned = tune(loaded, calibration[1], start, replace(FAST, bias_rate=0.0, steps=3))
    assert tuned.biases == {}
    assert not any(linear.bias for linear in tuned.document.linears.values())


def test_interpolation_meets_a_sparsity_between(
    calibration: Calibrated, loaded: PreTrainedModel, start: Plan
) -> None:
    made = calibration[1]
    high = make_plan(made, 0.7, "wina", "uniform", model=loaded, refine=True)
    low, high = tune(loaded, made, start, FAST), tune(loaded, made, high, FAST)
    between = interpolate(made, loaded, low, high, 0.6)
    assert between.document.target_sparsity == 0.6
    assert between.document.realized_sparsity == pytest.approx(0.6, abs=0.005)
    with pytest.raises(UsageError, match="between"):
        interpolate(made, loaded, low, high, 0.8)


def test_what_cannot_be_tuned_is_refused(
    calibration: Calibrated, loaded: PreTrainedModel, start: Plan
) -> None:
    made = calibration[1]
    topk = make_plan(made, 0.5, "wina", "uniform", "topk")
    with pytest.raises(UsageError, match="thresholds"):
        tune(loaded, made, topk, FAST)
    document = make_plan(made, 0.5, "wina", "uniform").document
    linears = dict(list(document.linears.items())[1:])
    vectors = {name: start.vectors[name] for name in linears}
    smaller = Plan(document.model_copy(update={"linears": linears}), vectors)
    with pytest.raises(UsageError, match="different linears"):
        tune(loaded, made, smaller, FAST)
    with pytest.raises(UsageError, match="at least 1"):
        TuningSettings(steps=0)


def test_tune_from_the_command_line(
    cli: Cli, calibration: Calibrated, qwen3: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    result = cli(
        *("tune", qwen3, "--calibration", calibration[0], "--sparsity", 0.4),
        *("--steps", 4, "--batch", 1, "-o", output, "--json"),
    )
    assert result.code == 0, result.said
    plan = Plan.load(output)
    assert plan.document.realized_sparsity == pytest.approx(0.4, abs=0.005)
    result = cli("run", qwen3, "--plan", output, "--max-new-tokens", 4, "--json")
    assert result.code == 0, result.said
    assert json.loads(result.out)["method"] == "tuned"
