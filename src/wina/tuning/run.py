"""Tune a plan. Streams windows, holds the sparsity, checkpoints, resumes, stops early.

The sparsity is held at the target by a multiplier mu on it, a proportional-integral controller
over steps: the gradient of log t_j is that of the KL minus mu times that of the sparsity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina.calibration.artifact import Calibration
from wina.calibration.planning import TOLERANCE, make_plan, realized_sparsity
from wina.errors import UsageError, WinaError
from wina.files import read_tensors, work_folder, write_tensors
from wina.layers import widened
from wina.measures import score_plan
from wina.plan import Plan
from wina.progress import bar, console
from wina.statistics import LinearStatistics
from wina.tuning.passes import Pass

TUNED = "tuned"  # the name of the method, among those of criteria
START = "loss"  # the criterion that tuning starts from
STATE = "tuning.safetensors"
LOWEST, HIGHEST = -30.0, 30.0  # of log t
PROPORTIONAL, INTEGRAL = 50.0, 1.0
SETTLE_ROUNDS = 6
SLOPE = 0.35  # d(sparsity)/d(common shift of log t), a guess that the rounds correct


@dataclass(frozen=True)
class TuningSettings:
    """How a plan is tuned.

    Attributes:
        steps: optimizer steps.
        batch: windows a step.
        context: tokens of a window; None is the calibration's, which is also the most.
        rate: Adam's learning rate for log t, cosine to zero after ten steps of warm-up.
        bias_rate: the same for output biases, in units of the rms of the linear's output;
            0 leaves biases out.
        temperature: width of the soft gate.
        seed: of the windows' order.
        evaluations: how often the held-out KL is measured; the best plan seen there is kept.
        checkpointing: recompute activations block by block in the backward pass: less memory,
            a third more time. None does so if the activations of one window are too many.
    """

    steps: int = 200
    batch: int = 4
    context: int | None = None
    rate: float = 0.02
    bias_rate: float = 0.01
    temperature: float = 0.3
    seed: int = 0
    evaluations: int = 4
    checkpointing: bool | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.evaluations < 1:
            raise UsageError("steps, batch and evaluations must be at least 1")
        if self.context is not None and self.context < 2:
            raise UsageError("a context of tuning needs at least 2 tokens")


def default_settings(device: str) -> TuningSettings:
    """Return settings for a kind of device: on a CPU few tokens a step, and few steps.

    What a step costs is its tokens, and small steps gain more for each token: 150 steps of 512
    tokens keep most of what 200 steps of 8,192 gain (docs/research.md).
    """
    if device == "cpu":
        return TuningSettings(steps=150, batch=2, context=256)
    return TuningSettings()


def tune(
    model: PreTrainedModel,
    calibration: Calibration,
    start: Plan,
    settings: TuningSettings | None = None,
    *,
    output: str | Path | None = None,
) -> Plan:
    """Return ``start`` with its thresholds tuned at its own target sparsity.

    Args:
        model: dense, in evaluation mode; the calibration's.
        calibration: its windows are tuned on, its held-out windows decide when to stop.
        start: a plan with threshold selection for the same linears.
        settings: how long and how.
        output: the plan's folder; work in progress is kept beside it, and taken up again.

    Raises:
        UsageError: a top-k plan, a target of 0, or a plan of other linears.
        WinaError: the KL is not finite.
    """
    settings = settings or default_settings(model.device.type)
    document = start.document
    if document.selection != "threshold" or document.target_sparsity == 0:
        raise UsageError("tuning needs a plan with thresholds and a sparsity above 0")
    statistics = calibration.linears(document.include_head)
    if [x.site.name for x in statistics] != list(document.linears):
        raise UsageError("the plan to start from and the calibration are of different linears")
    fingerprint = json.dumps(
        {
            "calibration": calibration.document.model_dump(mode="json", exclude={"versions"}),
            "plan": document.model_dump(mode="json", exclude={"versions"}),
            "settings": asdict(settings),
        }
    )
    with widened(model), work_folder(output, fingerprint, (STATE,)) as folder:
        return _Tuner(model, calibration, statistics, start, settings, folder).run()


def tuned_plan(
    calibration: Calibration,
    model: PreTrainedModel,
    sparsity: float,
    *,
    method: str = START,
    allocation: str | None = None,
    include_head: bool = False,
    settings: TuningSettings | None = None,
    output: str | Path | None = None,
) -> Plan:
    """Return a tuned plan for a target sparsity; see ``tune`` and ``wina.calibration.make_plan``.

    Args:
        calibration: of the model.
        model: dense.
        sparsity: the target, above 0.
        method: the criterion of the plan to start from.
        allocation: of the plan to start from; None is what the calibration found better.
        include_head: put lm_head under the same budget.
        settings: of tuning.
        output: the plan's folder, for work in progress.
    """
    start = make_plan(
        calibration, sparsity, method, allocation, include_head=include_head, model=model
    )
    return tune(model, calibration, start, settings, output=output)


class _Tuner:
    """Parameters, optimizer and schedule of one tuning."""

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        statistics: Sequence[LinearStatistics],
        start: Plan,
        settings: TuningSettings,
        folder: Path,
    ) -> None:
        self.model, self.calibration, self.start = model, calibration, start
        self.settings, self.folder = settings, folder
        self.sites = [linear.site for linear in statistics]
        self.target = start.document.target_sparsity
        device = model.device

        self.widths = [site.in_features for site in self.sites]
        self.outputs = [site.out_features for site in self.sites]
        vectors = [start.vectors[site.name].to(device) for site in self.sites]
        log_t = torch.cat(vectors).log().clamp(LOWEST, HIGHEST)
        scales = [_output_rms(linear).to(device) for linear in statistics]
        self.log_t = log_t.requires_grad_()
        self.bias = torch.zeros(sum(self.outputs), device=device, requires_grad=True)
        self.bias_scale = torch.cat(
            [scale.expand(width) for scale, width in zip(scales, self.outputs, strict=True)]
        )
        self.output_counts = torch.tensor([float(x) for x in self.outputs], device=device)
        # Cost of a channel: its weights, as a share of all weights.
        cost = [torch.full((site.in_features,), float(site.out_features)) for site in self.sites]
        self.total_cost = sum(linear.cost for linear in statistics)
        self.cost = torch.cat(cost).to(device) / self.total_cost
        self.rates = [settings.rate]
        groups: list[dict[str, Any]] = [{"params": [self.log_t]}]
        if settings.bias_rate:
            self.rates.append(settings.bias_rate)
            groups.append({"params": [self.bias]})
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)
        self.mu = 1.0
        self.step = 0
        self.best_kl = math.inf
        self.best = (self.log_t.detach().clone(), self.bias.detach().clone())
        self.windows = calibration.windows(length=settings.context)
        if not self.windows:
            raise WinaError("the calibration holds no whole window to tune on")

    def run(self) -> Plan:
        """Take all steps, and return the best plan at its target sparsity."""
        self._load()
        settings = self.settings
        distill = Pass(
            self.model,
            self.sites,
            self.log_t,
            self.bias if settings.bias_rate else None,
            self.bias_scale,
            shape=(settings.batch, self.windows[0].shape[1]),
            dense_prefix=self.calibration.document.dense_prefix,
            temperature=settings.temperature,
            checkpointing=settings.checkpointing,
        )
        total = settings.steps
        every = max(1, total // settings.evaluations)
        with bar("tuning", total, self.step) as advance:
            while self.step < total:
                until = min(total, (self.step // every + 1) * every)
                with distill.ready():
                    while self.step < until:
                        kl, sparsity = self._take_step(distill)
                        self.step += 1
                        advance(1)
                        if self.step % 10 == 0 or self.step == until:
                            console.print(
                                f"[dim]step {self.step}: KL {kl:.4f} nats a token, "
                                f"sparsity {sparsity:.3f}[/dim]",
                                highlight=False,
                            )
                self._evaluate()
                self._save()
        return self._settled()

    def _take_step(self, distill: Pass) -> tuple[float, float]:
        """Take one step; return the KL and the sparsity before it."""
        ids = torch.cat([self.windows[index] for index in self._indices()])
        distill.run(ids.to(self.model.device))
        dropped = (distill.state.dropped * self.output_counts).sum()
        total, missing = torch.stack([distill.kl, dropped]).tolist()
        if not math.isfinite(total):
            raise WinaError(f"the KL is not finite at step {self.step}; try a smaller rate")
        sparsity = missing / (self.total_cost * distill.scored)
        error = self.target - sparsity
        multiplier = self.mu + PROPORTIONAL * error
        self.mu += INTEGRAL * error
        assert self.log_t.grad is not None
        self.log_t.grad -= multiplier * self.cost * distill.state.density / distill.scored
        factor = self._schedule()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        with torch.no_grad():
            self.log_t.clamp_(LOWEST, HIGHEST)
        return total, sparsity

    def _schedule(self) -> float:
        warm = min(1.0, (self.step + 1) / 10)
        return warm * 0.5 * (1 + math.cos(math.pi * self.step / self.settings.steps))

    def _indices(self) -> list[int]:
        """Return this step's windows: shuffled epochs, the same for the same seed and step."""
        chosen = []
        for place in range(self.step * self.settings.batch, (self.step + 1) * self.settings.batch):
            epoch, offset = divmod(place, len(self.windows))
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.windows), generator=generator)
            chosen.append(int(order[offset]))
        return chosen

    def _plan(self, log_t: Tensor, bias: Tensor) -> Plan:
        """Return the plan of these parameters, sparsities of its linears not yet measured."""
        document = self.start.document
        names = [site.name for site in self.sites]
        vectors = dict(zip(names, torch.split(log_t.detach().exp(), self.widths), strict=True))
        # What never dropped anything at the start stays so.
        vectors = {
            name: torch.where(self.start.vectors[name].to(vector) > 0, vector, 0).cpu().clone()
            for name, vector in vectors.items()
        }
        biases = {}
        if self.settings.bias_rate:
            scaled = torch.split((bias * self.bias_scale).detach(), self.outputs)
            biases = {name: value.cpu().clone() for name, value in zip(names, scaled, strict=True)}
        linears = {
            name: linear.model_copy(update={"bias": bool(biases)})
            for name, linear in document.linears.items()
        }
        tuned = document.model_copy(
            update={
                "method": TUNED,
                "allocation": TUNED,
                "linears": linears,
                "calibration": {
                    **document.calibration,
                    "start": f"{document.method}, {document.allocation}",
                    **{f"tuning_{name}": value for name, value in asdict(self.settings).items()},
                },
            }
        )
        return Plan(tuned, vectors, biases)

    def _evaluate(self) -> None:
        """Keep the parameters if they are the best on held-out text so far."""
        plan = self._plan(self.log_t, self.bias)
        windows = self.calibration.windows(held_out=True)
        skip = self.calibration.document.dense_prefix
        totals, counter = score_plan(self.model, plan, windows, skip, "held-out KL")
        # A plan that drops less than asked must not win by that: mu is the KL's price of sparsity.
        kl = totals.kl + max(self.mu, 0.0) * max(0.0, self.target - counter.sparsity)
        console.print(
            f"[dim]step {self.step}: held-out KL {totals.kl:.4f}, "
            f"sparsity {counter.sparsity:.3f}[/dim]",
            highlight=False,
        )
        if kl < self.best_kl:
            self.best_kl = kl
            self.best = (self.log_t.detach().clone(), self.bias.detach().clone())

    def _settled(self) -> Plan:
        """Shift all log t together until the held-out sparsity meets the target."""
        log_t, bias = self.best
        shift, slope, last = 0.0, SLOPE, None
        for _ in range(SETTLE_ROUNDS):
            plan = self._plan(log_t + shift, bias)
            counter = realized_sparsity(self.calibration, self.model, plan)
            realized = counter.sparsity
            if abs(realized - self.target) <= TOLERANCE / 5:
                break
            if last is not None and abs(shift - last[0]) > 1e-6:
                slope = max(0.05, (realized - last[1]) / (shift - last[0]))
            last = shift, realized
            shift += (self.target - realized) / slope
        shares = counter.by_linear()
        linears = {
            name: linear.model_copy(update={"sparsity": shares.get(name, linear.sparsity)})
            for name, linear in plan.document.linears.items()
        }
        update = {"linears": linears, "realized_sparsity": realized}
        return replace(plan, document=plan.document.model_copy(update=update))

    def _save(self) -> None:
        tensors = {
            "log_t": self.log_t,
            "bias": self.bias,
            "best.log_t": self.best[0],
            "best.bias": self.best[1],
        }
        for number, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{number}.{name}"] = value
        facts = {"step": self.step, "mu": self.mu, "best_kl": self.best_kl}
        metadata = {name: repr(value) for name, value in facts.items()}
        write_tensors(self.folder / STATE, tensors, metadata)

    def _load(self) -> None:
        if not (self.folder / STATE).exists():
            return
        tensors, facts = read_tensors(self.folder / STATE)
        device = self.model.device
        with torch.no_grad():
            self.log_t.copy_(tensors["log_t"])
            self.bias.copy_(tensors["bias"])
        self.best = (tensors["best.log_t"].to(device), tensors["best.bias"].to(device))
        for number, parameter in enumerate(self._parameters()):
            prefix = f"adam.{number}."
            state = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            self.optimizer.state[parameter] = {
                name: value if name == "step" else value.to(device) for name, value in state.items()
            }
        self.step, self.mu = int(facts["step"]), float(facts["mu"])
        self.best_kl = float(facts["best_kl"])

    def _parameters(self) -> list[Tensor]:
        return [x for group in self.optimizer.param_groups for x in group["params"]]


def interpolate(
    calibration: Calibration, model: PreTrainedModel, low: Plan, high: Plan, sparsity: float
) -> Plan:
    """Return a plan for a sparsity between those of two tuned plans.

    log t and biases are taken linearly between the two, then all log t are shifted together until
    the sparsity on held-out text meets the target.

    Raises:
        UsageError: the plans are of different linears, or the sparsity is not between theirs.
    """
    first, last = low.document.target_sparsity, high.document.target_sparsity
    if list(low.document.linears) != list(high.document.linears) or not first < last:
        raise UsageError("interpolation needs two plans of the same linears, the lower one first")
    if not first <= sparsity <= last:
        raise UsageError(f"{sparsity} does not lie between {first} and {last}")
    part = (sparsity - first) / (last - first)
    target = low.document.model_copy(update={"target_sparsity": sparsity})
    tuner = _Tuner(
        model,
        calibration,
        calibration.linears(low.document.include_head),
        replace(low, document=target),
        TuningSettings(bias_rate=0.01 if low.biases else 0.0),
        Path(),
    )
    with torch.no_grad():
        logs = [
            torch.cat([plan.vectors[site.name].to(model.device) for site in tuner.sites])
            .log()
            .clamp(LOWEST, HIGHEST)
            for plan in (low, high)
        ]
        tuner.best = (torch.lerp(logs[0], logs[1], part), torch.zeros_like(tuner.bias))
        if low.biases and high.biases:
            sums = [
                torch.cat([plan.biases[site.name].to(model.device) for site in tuner.sites])
                for plan in (low, high)
            ]
            tuner.best = (tuner.best[0], torch.lerp(sums[0], sums[1], part) / tuner.bias_scale)
    return tuner._settled()


def _output_rms(linear: LinearStatistics) -> Tensor:
    """Return the rms of a linear's outputs if its inputs were uncorrelated, shape ()."""
    power = linear.column_norm.square() * linear.mean_square
    return (power.sum() / linear.site.out_features).sqrt().clamp(min=1e-12)
