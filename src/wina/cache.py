"""Calibrations and plans made on the way, kept so that the second run starts at once.

The key is the model's weights and every setting, so a stale entry is never used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from wina.calibration import Calibration, CalibrationSettings, SelfText, calibrate, make_plan
from wina.errors import WinaError
from wina.files import cache_dir
from wina.models import LoadedModel, identify
from wina.plan import ModelIdentity, Plan
from wina.progress import note


def cached_calibration(
    loaded: LoadedModel, identity: ModelIdentity, settings: CalibrationSettings
) -> Calibration:
    """Return the model's calibration on its own text, made now if there is none."""
    source = SelfText(seed=settings.seed)
    path = _entry("calibrations", identity, source.describe(), asdict(settings))
    if path.is_dir():
        try:
            return Calibration.load(path)
        except WinaError as error:
            note(str(error))
    note(f"calibrating {loaded.name} once, on text it writes itself")
    return calibrate(
        loaded.model,
        loaded.tokenizer,
        source,
        settings,
        name=loaded.name,
        revision=loaded.revision,
        output=path,
    )


def cached_plan(
    loaded: LoadedModel,
    settings: CalibrationSettings,
    sparsity: float,
    method: str,
    allocation: str | None,
    selection: str,
    include_head: bool = False,
) -> Plan:
    """Return a refined plan for the model, made now if there is none."""
    identity = identify(loaded.model, loaded.name, loaded.revision)
    request = [asdict(settings), sparsity, method, allocation, selection, include_head]
    path = _entry("plans", identity, *request)
    if path.is_dir():
        try:
            return Plan.load(path)
        except WinaError as error:
            note(str(error))
    plan = make_plan(
        cached_calibration(loaded, identity, settings),
        sparsity,
        method,
        allocation,
        selection,
        include_head=include_head,
        model=loaded.model,
        refine=True,
    )
    plan.save(path)
    return plan


def _entry(kind: str, identity: ModelIdentity, *settings: object) -> Path:
    facts = [identity.config_hash, identity.weights_hash, identity.dtype, *settings]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / kind / key
