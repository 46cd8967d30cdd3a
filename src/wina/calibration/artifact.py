"""What calibration makes: statistics of every linear, the tokens they came from, a verdict.

A folder holds ``calibration.json``, ``statistics.safetensors`` and ``tokens.npy`` (the token ids
of the calibration and the held-out text, so that refining, searching and tuning need nothing
else). There are no activations in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from wina.errors import UsageError, WinaError
from wina.files import (
    check_replaceable,
    read_json,
    read_tensors,
    replacing_folder,
    write_tensors,
    write_text,
)
from wina.models import Site
from wina.plan import ModelIdentity
from wina.statistics import BINS, LinearStatistics

DOCUMENT, STATISTICS, TOKENS = "calibration.json", "statistics.safetensors", "tokens.npy"


class SiteRecord(BaseModel):
    """A linear, as a calibration's document lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    block: int | None
    in_features: int = Field(gt=0)
    out_features: int = Field(gt=0)
    expert: int | None = None


class Verdict(BaseModel):
    """Which allocation lost less on held-out text, at one sparsity.

    ``kl`` is the mean KL to the dense model by allocation, nats a token, and ``sparsity`` what
    each realized.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    target_sparsity: float
    kl: dict[str, float]
    sparsity: dict[str, float]

    @property
    def best(self) -> str:
        """The allocation to use: global unless uniform is better."""
        return "global" if self.kl["global"] <= self.kl["uniform"] else "uniform"


class CalibrationDocument(BaseModel):
    """Everything of a calibration but its arrays.

    Attributes:
        source: what the text was.
        tokens: number of calibration tokens; ``held_out`` tokens follow them.
        window: tokens of a window, the ``start`` ids before them not counted.
        dense_prefix: first positions of each window that were not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: ModelIdentity
    source: str
    tokens: int = Field(gt=0)
    held_out: int = Field(gt=0)
    window: int = Field(gt=0)
    start: list[int]
    dense_prefix: int = Field(ge=0)
    seed: int
    linears: list[SiteRecord] = Field(min_length=1)
    verdict: Verdict | None = None
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model's linears, from which plans are made.

    Attributes:
        document: settings and records.
        statistics: of each linear, the blocks' in order and then the head's.
        tokens: ids of calibration and held-out text, shape (tokens + held_out,), uint32.
    """

    document: CalibrationDocument
    statistics: list[LinearStatistics]
    tokens: NDArray[np.uint32]

    def linears(self, include_head: bool) -> list[LinearStatistics]:
        """Return the statistics of the blocks' linears, and of the head if asked for."""
        if include_head and self.statistics[-1].site.block is not None:
            raise UsageError("the calibrated model has no linear output head to include")
        return [x for x in self.statistics if include_head or x.site.block is not None]

    def windows(
        self, held_out: bool = False, limit: int | None = None, length: int | None = None
    ) -> list[Tensor]:
        """Return windows of calibration, or of held-out, text; each int64, (1, positions).

        Args:
            held_out: of the held-out text.
            limit: the first so many only.
            length: tokens of a window if not the calibration's, at most that.
        """
        document = self.document
        window = min(length or document.window, document.window)
        first, count = (document.tokens, document.held_out) if held_out else (0, document.tokens)
        offsets = range(0, count - window + 1, window)[:limit]
        return [
            window_ids(self.tokens, document.start, first + offset, window) for offset in offsets
        ]

    def plan(
        self,
        sparsity: float,
        method: str = "wina",
        allocation: str | None = None,
        selection: str = "threshold",
        **options: Any,
    ) -> Any:
        """Return a Plan; see ``wina.calibration.make_plan`` for the arguments."""
        from wina.calibration.planning import make_plan

        return make_plan(self, sparsity, method, allocation, selection, **options)

    def save(self, folder: str | Path) -> Path:
        """Write the calibration's folder, whole or not at all, and return its path."""
        path = Path(folder)
        check_replaceable(path, DOCUMENT)
        tensors: dict[str, Tensor] = {}
        for linear in self.statistics:
            name = linear.site.name
            tensors[f"{name}.column_norm"] = linear.column_norm
            tensors[f"{name}.mean_square"] = linear.mean_square
            if linear.gradient_rms is not None:
                tensors[f"{name}.gradient_rms"] = linear.gradient_rms
            if linear.site.expert is not None:
                tensors[f"{name}.usage"] = torch.tensor(linear.usage, dtype=torch.float64)
            for criterion, counts in linear.histograms.items():
                tensors[f"{name}.scores.{criterion}"] = counts
        with replacing_folder(path) as temporary:
            write_tensors(temporary / STATISTICS, tensors, {"format": "pt"})
            np.save(temporary / TOKENS, self.tokens, allow_pickle=False)
            write_text(temporary / DOCUMENT, self.document.model_dump_json(indent=1))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read a calibration's folder.

        Raises:
            WinaError: it is missing, incomplete or damaged.
        """
        path = Path(folder)
        if not path.is_dir():
            raise WinaError(f"there is no calibration folder {str(path)!r}; run `wina calibrate`")
        document = read_json(path / DOCUMENT, CalibrationDocument)
        tensors, _ = read_tensors(path / STATISTICS)
        try:
            tokens = np.load(path / TOKENS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise WinaError(f"{path / TOKENS} is missing or damaged; calibrate again") from error
        if tokens.shape != (document.tokens + document.held_out,):
            raise WinaError(f"{path / TOKENS} does not fit {DOCUMENT}; calibrate again")
        statistics = [_statistics(record, tensors, path) for record in document.linears]
        return cls(document, statistics, tokens)


def _statistics(record: SiteRecord, tensors: dict[str, Tensor], path: Path) -> LinearStatistics:
    site = Site(**record.model_dump())
    prefix = f"{site.name}.scores."
    try:
        found = LinearStatistics(
            site=site,
            column_norm=tensors[f"{site.name}.column_norm"],
            mean_square=tensors[f"{site.name}.mean_square"],
            gradient_rms=tensors.get(f"{site.name}.gradient_rms"),
            histograms={
                name.removeprefix(prefix): counts
                for name, counts in tensors.items()
                if name.startswith(prefix)
            },
            usage=1.0 if site.expert is None else float(tensors[f"{site.name}.usage"]),
        )
    except KeyError as error:
        raise WinaError(f"{path / STATISTICS} lacks {error}; calibrate again") from error
    vectors = [found.column_norm, found.mean_square]
    if any(vector.shape != (site.in_features,) for vector in vectors) or any(
        counts.shape != (BINS,) for counts in found.histograms.values()
    ):
        raise WinaError(f"{path / STATISTICS} has wrong shapes for {site.name}; calibrate again")
    return found


def window_ids(tokens: NDArray[np.uint32], start: list[int], first: int, length: int) -> Tensor:
    """Return the ids of one window, its start before it, shape (1, positions), int64."""
    ids = torch.from_numpy(tokens[first : first + length].astype(np.int64))
    return torch.cat([torch.tensor(start, dtype=torch.int64), ids])[None]
