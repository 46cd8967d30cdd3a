from pathlib import Path

import pytest

from wina import cache
from wina.calibration import CalibrationSettings
from wina.files import cache_dir
from wina.models import LoadedModel, load_model

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
