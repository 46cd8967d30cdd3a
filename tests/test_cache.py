from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wina import cache
from wina.calibration import CalibrationSettings
from wina.files import cache_dir
from wina.models import LoadedModel, identify, load_model
from wina.plan import Plan, shipped, shipped_plan, shipped_sparsities
from wina.tuning import TuningSettings, tuned_plan

SETTINGS = CalibrationSettings(tokens=512, context=64)


@pytest.fixture
def loaded(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path / "cache"))
    return load_model(str(qwen3))


def entries(kind: str) -> list[Path]:
    folder = cache_dir() / kind
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_plan_is_made_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.cached_plan(loaded, SETTINGS, 0.5, "wina", None, "threshold")
    assert first.document.realized_sparsity == pytest.approx(0.5, abs=0.005)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "make_plan", fail)
        second = cache.cached_plan(loaded, SETTINGS, 0.5, "wina", None, "threshold")
    assert second.document == first.document
    # Another target needs another plan, and no other calibration.
    monkeypatch.setattr(cache, "calibrate", fail)
    cache.cached_plan(loaded, SETTINGS, 0.3, "wina", None, "threshold")
    assert (len(entries("plans")), len(entries("calibrations"))) == (2, 1)


def test_every_setting_makes_another_entry(loaded: LoadedModel) -> None:
    requests = [
        (0.5, "wina", "uniform", "threshold", False),
        (0.4, "wina", "uniform", "threshold", False),
        (0.5, "teal", "uniform", "threshold", False),
        (0.5, "wina", "global", "threshold", False),
        (0.5, "wina", "uniform", "topk", False),
        (0.5, "wina", "uniform", "threshold", True),
    ]
    for request in requests:
        cache.cached_plan(loaded, SETTINGS, *request)
    assert len(entries("plans")) == len(requests)


def test_a_damaged_entry_is_made_again(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    request = (0.5, "wina", "uniform", "threshold")
    wanted = cache.cached_plan(loaded, SETTINGS, *request)
    (plan,), (calibration,) = entries("plans"), entries("calibrations")
    (plan / "plan.json").write_text("{")
    (calibration / "statistics.safetensors").write_bytes(b"")
    found = cache.cached_plan(loaded, SETTINGS, *request)
    assert "statistics.safetensors" in capsys.readouterr().err
    assert found.document == wanted.document
    assert cache.cached_plan(loaded, SETTINGS, *request).document == wanted.document


def test_a_tuned_plan_is_made_once_and_again_on_request(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def quick(*arguments: Any, **options: Any) -> Plan:
        made.append(options["output"])
        return tuned_plan(*arguments, **options, settings=TuningSettings(steps=2, batch=1))

    monkeypatch.setattr(cache, "tuned_plan", quick)
    first = cache.cached_plan(loaded, SETTINGS, 0.5, "tuned", None, "threshold")
    assert first.document.method == "tuned"
    assert first.document.realized_sparsity == pytest.approx(0.5, abs=0.005)
    other = replace(SETTINGS, tokens=1_024)
    again = cache.cached_plan(loaded, other, 0.5, "tuned", None, "threshold")
    assert (again.document, len(made)) == (first.document, 1)
    cache.cached_plan(loaded, SETTINGS, 0.5, "tuned", None, "threshold", retune=True)
    assert len(made) == 2


def test_plans_that_come_with_wina_are_taken_and_interpolated(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identify(loaded.model, loaded.name)
    assert shipped_sparsities(identity) == ()
    assert not cache.tuned_at_hand(loaded, 0.5)
    calibration = cache.cached_calibration(loaded, identity, SETTINGS)
    settings = TuningSettings(steps=1, batch=1)
    for sparsity in (0.4, 0.6):
        plan = tuned_plan(calibration, loaded.model, sparsity, settings=settings)
        plan.save(tmp_path / "shipped" / str(sparsity))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    shipped._documents.cache_clear()
    try:
        assert shipped_sparsities(identity) == (0.4, 0.6)
        other = identity.model_copy(update={"weights_hash": "0" * 64})
        assert shipped_sparsities(other) == ()
        with pytest.raises(KeyError):
            shipped_plan(identity, 0.5)
        found = [cache.tuned_at_hand(loaded, s) for s in (0.3, 0.4, 0.5, 0.6, 0.7)]
        assert found == [False, True, True, True, False]
        monkeypatch.setattr(cache, "tuned_plan", None)
        exact = cache.cached_plan(loaded, SETTINGS, 0.6, "tuned", None, "threshold")
        wanted = shipped_plan(identity, 0.6).vectors
        assert all(torch.equal(vector, wanted[name]) for name, vector in exact.vectors.items())
        between = cache.cached_plan(loaded, SETTINGS, 0.5, "tuned", None, "threshold")
        assert between.document.target_sparsity == 0.5
        assert between.document.realized_sparsity == pytest.approx(0.5, abs=0.005)
    finally:
        shipped._documents.cache_clear()
