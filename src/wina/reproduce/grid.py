"""The grid: each cell is a method at a sparsity on a model, kept in a file of its own when done.

Started again with the same settings, a grid goes on with the cells that are missing; more models,
methods and sparsities may be added to it. Several processes may fill it side by side: decoders of
small models and searches keep a GPU waiting for Python most of the time.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from wina.allocation.build import versions
from wina.calibration import Calibration, CalibrationSettings, FileText, calibrate, default_text
from wina.calibration.text import check_text
from wina.cost import token_bytes
from wina.errors import UsageError
from wina.evaluation import text_windows
from wina.files import read_json, write_text
from wina.measures import Totals, score_plan
from wina.methods import Method, Setting, methods
from wina.models import LoadedModel, identify, load_model
from wina.plan import Plan
from wina.progress import bar, hide_bars, note
from wina.selection import check_sparsity

SETTINGS = "settings.json"
DENSE = "dense"


@dataclass(frozen=True)
class GridSettings:
    """What all cells of a grid have in common.

    Attributes:
        text: UTF-8 files that are scored.
        calibration_text: UTF-8 files; none lets each model write its own.
        tokens: to score at most.
        calibration_tokens: of calibration.
        context: positions of a window.
        dense_prefix: first positions of a window, dense and not scored.
        search_tokens: of calibration text that a greedy search reads.
        dtype: of the weights; auto is the checkpoint's.
    """

    text: tuple[Path, ...]
    calibration_text: tuple[Path, ...] = ()
    tokens: int = 20_480
    calibration_tokens: int = 16_384
    context: int = 2_048
    dense_prefix: int = 20
    search_tokens: int = 2_048
    dtype: str = "float32"

    def record(self) -> str:
        """Return the settings as text, to tell one grid from another; files go by their hashes."""
        fields = asdict(self)
        for name in ("text", "calibration_text"):
            fields[name] = FileText(fields[name]).describe()
        return "\n".join(f"{name} = {value}" for name, value in fields.items()) + "\n"


class Cell(BaseModel):
    """One result.

    Attributes:
        status: done, or refused: the method cannot do this, for ``reason``.
        sparsity: realized, of the gates: the share of the planned linears' weights not touched.
        bytes: of weights, thresholds, rotations and low-rank terms read for a token, head included.
        dense_bytes: what the dense model reads.
        nll: summed negative log likelihood of each window, nats; ``dense_nll`` the dense model's.
        positions: scored positions of each window.
        plan_seconds: making the plan; searches shared with other sparsities count where they ran.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str
    paper: str
    departures: str
    target: float
    status: Literal["done", "refused"] = "done"
    reason: str = ""
    sparsity: float = 0.0
    bytes: float = 0.0
    dense_bytes: float = 0.0
    nll: list[float] = []
    dense_nll: list[float] = []
    positions: list[int] = []
    kl: float = 0.0
    agreement: float = 0.0
    seed: int
    dtype: str
    device: str
    plan_seconds: float = 0.0
    score_seconds: float = 0.0
    versions: dict[str, str]


def reproduce(
    output: Path,
    models: Sequence[str],
    names: Sequence[str],
    sparsities: Sequence[float],
    settings: GridSettings,
    device: str = "auto",
    seeds: Sequence[int] = (0,),
    fill: bool = True,
    processes: int = 1,
) -> list[Cell]:
    """Fill a grid, going on where it was, and return all its cells in order.

    Args:
        output: folder of the grid.
        models: hub ids, folders or GGUF files.
        names: of methods.
        sparsities: targets, in (0, 1).
        settings: what the cells have in common.
        device: a torch device, or auto.
        seeds: of searches and of what is random; a method that has neither runs under the first.
        fill: the cells that are missing; if not, return those that are there.
        processes: that fill them. Each has a model of its own, and does a method of a model
            under a seed at a time; methods are known to them by entry points, not by what this
            process registered.

    Raises:
        UsageError: an unknown name or bad number, or the folder holds a grid of other settings,
            or none of the cells if they are not to be filled.
    """
    chosen = [methods.get(name) for name in names]
    if processes < 1:
        raise UsageError(f"a grid takes at least one process; got {processes}")
    for sparsity in sparsities:
        if check_sparsity(sparsity) == 0:
            raise UsageError("the dense model is scored anyway; sparsities must be above 0")
    for path in (*settings.text, *settings.calibration_text):
        check_text(path)
    models, chosen = list(dict.fromkeys(models)), list(dict.fromkeys(chosen))
    if len({short_name(model) for model in models}) < len(models):
        raise UsageError(f"two of the models have one name in files: {', '.join(models)}")
    _check_folder(output, settings)
    order = sorted(set(sparsities), reverse=True)  # a search to the highest serves the others
    seeds = list(dict.fromkeys(seeds))
    wanted = [
        (model, method, s, seed)
        for model in models
        for seed in seeds
        for method in chosen
        if method.seeded or seed == seeds[0]
        for s in order
    ]
    todo = [x for x in wanted if not _path(output, *x).exists()]
    if not fill:
        wanted, todo = [x for x in wanted if x not in todo], []
        if not wanted:
            raise UsageError(f"{output} holds none of these cells yet")
    with bar("reproduce", len(wanted), len(wanted) - len(todo)) as advance:
        if processes > 1 and todo:
            _fill_side_by_side(output, todo, order, settings, device, processes, advance)
            todo = []
        for model in models:
            mine = [rest for name, *rest in todo if name == model]
            if mine:
                _fill(output, model, mine, order, settings, device, advance)
    cells = [read_json(_path(output, *x), Cell) for x in wanted]
    for cell, (model, *_) in zip(cells, wanted, strict=True):
        if cell.model != model:
            raise UsageError(f"{output} holds another model of the name {short_name(model)!r}")
    return sorted(
        cells, key=lambda x: (models.index(x.model), names.index(x.method), x.target, x.seed)
    )


def _check_folder(output: Path, settings: GridSettings) -> None:
    path = output / SETTINGS
    if path.exists() and path.read_text(encoding="utf-8") != settings.record():
        raise UsageError(f"{output} holds a grid of other settings (see {path}); choose another")
    if not path.exists() and output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} exists and is not a grid; choose another folder")
    write_text(path, settings.record())


def short_name(model: str) -> str:
    """Return a model's name as a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name if "/" in model else model)


def _path(output: Path, model: str, method: Method, sparsity: float, seed: int) -> Path:
    name = f"{method.name}-{sparsity:g}-seed{seed}.json"
    return output / "cells" / short_name(model) / name


def _fill_side_by_side(
    output: Path,
    todo: Sequence[tuple[str, Method, float, int]],
    sparsities: Sequence[float],
    settings: GridSettings,
    device: str,
    processes: int,
    advance: Callable[[int], None],
) -> None:
    jobs: dict[tuple[str, str, int], list[tuple[float, int]]] = {}
    # Searches first: they take longest.
    for source, method, sparsity, seed in sorted(todo, key=lambda x: not x[1].seeded):
        jobs.setdefault((source, method.name, seed), []).append((sparsity, seed))
    sources = dict.fromkeys(source for source, *_ in jobs)
    shared = (output, sparsities, settings, device)
    with multiprocessing.get_context("spawn").Pool(processes, _be_quiet) as pool:
        pool.starmap(_work, [(source, None, [], *shared) for source in sources])
        runs = [
            pool.apply_async(_work, (source, name, cells, *shared), callback=advance)
            for (source, name, _), cells in jobs.items()
        ]
        for run in runs:
            run.get()


def _be_quiet() -> None:
    """Leave bars to the process that started this one."""
    hide_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _work(
    source: str,
    name: str | None,
    cells: Sequence[tuple[float, int]],
    output: Path,
    sparsities: Sequence[float],
    settings: GridSettings,
    device: str,
) -> int:
    """Fill the cells of one method, in a process of its own; without one calibrate the model."""
    todo = [] if name is None else [(methods.get(name), *cell) for cell in cells]
    _fill(output, source, todo, sparsities, settings, device, lambda _: None)
    return len(todo)


def _fill(
    output: Path,
    source: str,
    todo: Sequence[Sequence[Any]],
    sparsities: Sequence[float],
    settings: GridSettings,
    device: str,
    advance: Callable[[int], None],
) -> None:
    loaded = load_model(source, dtype=settings.dtype, device=device)
    model = loaded.model
    windows, _ = text_windows(
        model,
        loaded.tokenizer,
        settings.text,
        settings.tokens,
        settings.context,
        settings.dense_prefix,
    )
    setting = Setting(
        model,
        _calibration(output, source, loaded, settings),
        sparsities,
        search_tokens=settings.search_tokens,
    )
    for method, sparsity, seed in todo:
        facts: dict[str, Any] = {
            "model": source,
            "method": method.name,
            "paper": method.paper,
            "departures": method.departures,
            "target": sparsity,
            "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": _device_name(model.device),
            "versions": versions(),
        }
        begin = time.perf_counter()
        try:
            plan = method.plan(setting.reseeded(seed), sparsity)
        except UsageError as error:
            cell = Cell(**facts, status="refused", reason=str(error))
        else:
            planned = time.perf_counter()
            scores = _score(model, plan, windows, settings.dense_prefix)
            seconds: dict[str, Any] = {
                "plan_seconds": planned - begin,
                "score_seconds": time.perf_counter() - planned,
            }
            cell = Cell(**facts, **scores, **seconds)
        write_text(_path(output, source, method, sparsity, seed), cell.model_dump_json(indent=1))
        advance(1)
        which = f" (seed {seed})" if seed else ""
        note(f"{source}, {method.name} at {sparsity:.0%}{which}: {_said(cell)}")


def _said(cell: Cell) -> str:
    if cell.status == "refused":
        return cell.reason
    return (
        f"perplexity {perplexity(cell.nll, cell.positions):.3f}, sparsity {cell.sparsity:.3f}, "
        f"plan {cell.plan_seconds:.1f} s, score {cell.score_seconds:.1f} s"
    )


def perplexity(nll: Sequence[float], positions: Sequence[int]) -> float:
    """Return exp of the mean negative log likelihood."""
    return Totals(sum(positions), sum(nll)).perplexity


def _calibration(
    output: Path, source: str, loaded: LoadedModel, settings: GridSettings
) -> Calibration:
    path = output / "calibrations" / short_name(source)
    if path.is_dir():
        found = Calibration.load(path)
        found.document.model.check(identify(loaded.model, loaded.name))
        return found
    text = FileText(settings.calibration_text) if settings.calibration_text else None
    return calibrate(
        loaded.model,
        loaded.tokenizer,
        text or default_text(),
        CalibrationSettings(
            tokens=settings.calibration_tokens,
            context=settings.context,
            dense_prefix=settings.dense_prefix,
            verdict=False,
        ),
        name=loaded.name,
        revision=loaded.revision,
        output=path,
    )


def _score(
    model: PreTrainedModel, plan: Plan, windows: Sequence[Tensor], dense_prefix: int
) -> dict[str, Any]:
    each: list[Totals] = []
    total, counter = score_plan(model, plan, windows, dense_prefix, "scoring", each)
    read, dense = token_bytes(model, plan, counter)
    return {
        "sparsity": counter.sparsity,
        "bytes": read,
        "dense_bytes": dense,
        "nll": [part.nll for part in each],
        "dense_nll": [part.dense_nll for part in each],
        "positions": [part.positions for part in each],
        "kl": total.kl,
        "agreement": total.agreement,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
