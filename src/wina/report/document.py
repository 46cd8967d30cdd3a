"""The numbers of a report; its JSON file is this schema, and the page is made from nothing else."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from wina.bench import BenchReport
from wina.bench.operators import Roofline
from wina.evaluation import Evaluation
from wina.evaluation.tasks import TasksEvaluation


class PlanNote(BaseModel):
    """What the page calls a plan, how it is used, and where it came from.

    Attributes:
        use: options of ``wina run`` that run the model under it.
    """

    name: str
    use: str
    calibration: dict[str, str | int | float | bool | None] = {}


class ScoreHistogram(BaseModel):
    """How far scores are from the threshold: |x_j| / t_j of one kind of linear in one block.

    Attributes:
        shares: of all channels and positions, by bin of ``ScoreHistograms.edges``.
        dropped: the share below the threshold.
        others: by number of another plan, where its threshold lies: t'_j / t_j of the middle
            channel.
    """

    kind: str
    block: int
    shares: list[float]
    dropped: float
    others: dict[int, float] = {}


class ScoreHistograms(BaseModel):
    """The histograms of one plan, on text, as its own gates see it.

    Attributes:
        plan: its number.
        edges: of the bins, score over threshold; what is outside counts in the outer bins.
    """

    plan: int
    edges: list[float]
    histograms: list[ScoreHistogram]


class Text(BaseModel):
    """A greedy answer, and where it leaves the dense model's.

    Attributes:
        plan: number of the plan; None is the dense model.
        same: tokens before the first that differs; None if none does.
        start: text of those tokens.
        first: text of the first token that differs.
        rest: text after it.
    """

    plan: int | None
    tokens: int
    same: int | None
    start: str
    first: str = ""
    rest: str = ""


class Sample(BaseModel):
    """A prompt, the dense model's answer, and that of each plan."""

    prompt: str
    texts: list[Text]


class Recommendation(BaseModel):
    """The plan of the highest sparsity within the limits.

    Attributes:
        plan: its number; None if no plan keeps them.
        limits: what may be lost, in words.
        how: where the plan came from and on which text the limits were checked.
    """

    plan: int | None
    limits: str
    how: str


class Report(BaseModel):
    """One report.

    Attributes:
        source: arguments of other commands that load the model.
        plans: in the order in which all results of plans are listed.
        command: that makes the report again.
        settings: what was asked for, by name.
        notes: what is not there, and why.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["wina report"] = "wina report"
    model: str
    source: str = ""
    created: str
    command: str
    settings: dict[str, str]
    machine: dict[str, str]
    versions: dict[str, str]
    plans: list[PlanNote]
    quality: Evaluation
    tasks: TasksEvaluation | None = None
    speed: BenchReport | None = None
    operators: Roofline | None = None
    scores: ScoreHistograms | None = None
    samples: list[Sample] = []
    recommendation: Recommendation
    notes: list[str] = []
