"""Calibrations that kill themselves: run in a process of their own, forked from a fresh one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers import make_model, make_tokenizer
from wina.calibration import (
    Calibration,
    CalibrationSettings,
    DefaultText,
    FileText,
    SelfText,
    calibrate,
    run,
)

SETTINGS = CalibrationSettings(tokens=1024, context=128, dense_prefix=4)
KIND = "qwen3"


@dataclass(frozen=True)
class Death:
    """Die before call number ``calls`` (from zero) of ``owner.name``; ``then`` after it."""

    owner: str
    name: str
    calls: int
    after: bool = False


def source_of(text: Path | None) -> FileText | DefaultText:
    """Return small pieces, so that writing tokens takes several."""
    if text is not None:
        return FileText((text,))
    return DefaultText(SelfText(seed=3, batch=2, length=64))


def calibrated(output: Path | None, text: Path | None, **changes: Any) -> Calibration:
    """Calibrate the tiny model, saving the work in progress after every window."""
    settings = CalibrationSettings(**{**vars(SETTINGS), **changes})
    return calibrate(
        make_model(KIND), make_tokenizer(), source_of(text), settings, name="tiny", output=output
    )


def _die(output: Path, text: Path | None, death: Death) -> None:
    import importlib

    torch.set_num_threads(1)
    run.SECONDS = -1.0
    owner: Any = importlib.import_module(death.owner.partition(":")[0])
    for part in filter(None, death.owner.partition(":")[2].split(".")):
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, death.name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == death.calls:
            if death.after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return original(*args, **kwargs)

    setattr(owner, death.name, counted)
    calibrated(output, text)


def kill(output: Path, text: Path | None, death: Death) -> int | None:
    """Calibrate in a process that is killed on its way, and return how it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.calibration.killing"])
    process = context.Process(target=_die, args=(output, text, death))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode
