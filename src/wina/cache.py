"""Calibrations and plans made on the way, kept so that the second run starts at once.

The key is the model's weights and every setting, so a stale entry is never used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from wina.calibration import Calibration, CalibrationSettings, calibrate, default_text, make_plan
from wina.errors import WinaError
from wina.files import cached
from wina.models import LoadedModel, identify
from wina.plan import ModelIdentity, Plan, shipped_plan, shipped_sparsities
from wina.progress import note
from wina.tuning import TUNED, interpolate, tuned_plan


def cached_calibration(
    loaded: LoadedModel, identity: ModelIdentity, settings: CalibrationSettings
) -> Calibration:
    """Return the model's calibration on the default text, made now if there is none."""
    source = default_text(settings.seed)
    path = _entry("calibrations", identity, source.describe(), asdict(settings))
    if path.is_dir():
        try:
            return Calibration.load(path)
        except WinaError as error:
            note(str(error))
    note(f"calibrating {loaded.name} once, on text it writes itself and on docstrings")
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
    retune: bool = False,
) -> Plan:
    """Return a plan for the model that meets the sparsity, made now if there is none.

    Args:
        loaded: the model, dense.
        settings: of the calibration, if one has to be made.
        sparsity: the target.
        method: a criterion's name, or "tuned".
        allocation: None is what the calibration found better.
        selection: threshold or topk.
        include_head: put lm_head under the same budget.
        retune: tune again, whatever there is; only with "tuned".
    """
    identity = identify(loaded.model, loaded.name, loaded.revision)
    # A tuned plan is found again whatever calibration it was, or would be, made from.
    made_from = settings.seed if method == TUNED else asdict(settings)
    request = [made_from, sparsity, method, allocation, selection, include_head]
    path = _entry("plans", identity, *request)
    if path.is_dir() and not retune:
        try:
            return Plan.load(path)
        except WinaError as error:
            note(str(error))
    if method == TUNED:
        own = allocation is not None or include_head or retune
        plan = None if own else _from_shipped(loaded, identity, settings, sparsity)
        if plan is None:
            note(f"tuning a plan for {loaded.name} once; it is kept for the next time")
            calibration = cached_calibration(loaded, identity, settings)
            plan = tuned_plan(
                calibration,
                loaded.model,
                sparsity,
                allocation=allocation,
                include_head=include_head,
                output=path,
            )
    else:
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


def tuned_at_hand(loaded: LoadedModel, sparsity: float) -> bool:
    """Return whether a tuned plan for this sparsity comes with wina, or follows from some."""
    known = shipped_sparsities(identify(loaded.model, loaded.name, loaded.revision))
    return bool(known) and known[0] <= sparsity <= known[-1]


def _from_shipped(
    loaded: LoadedModel, identity: ModelIdentity, settings: CalibrationSettings, sparsity: float
) -> Plan | None:
    """Return the plan that comes with wina, or one between two that do; None if neither is."""
    known = shipped_sparsities(identity)
    if not known or not known[0] <= sparsity <= known[-1]:
        return None
    if sparsity in known:
        return shipped_plan(identity, sparsity)
    low = max(one for one in known if one < sparsity)
    high = min(one for one in known if one > sparsity)
    return interpolate(
        cached_calibration(loaded, identity, settings),
        loaded.model,
        shipped_plan(identity, low),
        shipped_plan(identity, high),
        sparsity,
    )


def _entry(kind: str, identity: ModelIdentity, *settings: object) -> Path:
    facts = [identity.config_hash, identity.weights_hash, identity.dtype, *settings]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return cached(kind, key)
