import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from tests.calibration.killing import Death, calibrated, kill
from wina.calibration import Calibration, run
from wina.plan import Plan

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs fork servers"
)
RUN = "wina.calibration.run"
# With the default text: 6 pieces of tokens, 9 windows of 128 of gradients, then of scores.
DEATHS = {
    "before the first token": Death(RUN, "_tokens", 0),
    "after two pieces of tokens": Death("wina.calibration.text:SelfText", "_sample", 2),
    "while tokens are noted": Death(f"{RUN}", "write_text", 3),
    "after one window of gradients": Death(RUN, "add_gradients", 1),
    "after five windows of gradients": Death(RUN, "add_gradients", 5),
    "while sums are written": Death(RUN, "write_tensors", 3),
    "between gradients and scores": Death(f"{RUN}:_State", "finish_stage", 0, after=True),
    "before the first scores": Death(RUN, "add_scores", 0),
    "after five windows of scores": Death(RUN, "add_scores", 5),
    "before the verdict": Death(RUN, "judge", 0),
    "before the result is written": Death("wina.calibration.artifact:Calibration", "save", 0),
    "while the result is written": Death("wina.calibration.artifact", "write_text", 0),
    "before the work in progress goes": Death("wina.files:shutil", "rmtree", 0),
}


@pytest.fixture(autouse=True)
def _save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECONDS", -1.0)


@pytest.fixture(scope="module")
def uninterrupted() -> Calibration:
    return calibrated(None, None)


@pytest.fixture(scope="module")
def uninterrupted_from_file(text: Path) -> Calibration:
    return calibrated(None, text)


def assert_identical(found: Calibration, wanted: Calibration) -> None:
    assert found.document == wanted.document
    assert (found.tokens == wanted.tokens).all()
    for one, other in zip(found.statistics, wanted.statistics, strict=True):
        assert one.site == other.site
        assert torch.equal(one.column_norm, other.column_norm)
        assert torch.equal(one.mean_square, other.mean_square)
        assert one.gradient_rms is not None
        assert other.gradient_rms is not None
        assert torch.equal(one.gradient_rms, other.gradient_rms)
        assert one.histograms.keys() == other.histograms.keys()
        assert all(
            torch.equal(counts, other.histograms[name]) for name, counts in one.histograms.items()
        )
    first, second = (x.plan(0.5, "loss", "global") for x in (found, wanted))
    assert isinstance(first, Plan)
    assert first.document == second.document
    assert all(torch.equal(vector, second.vectors[name]) for name, vector in first.vectors.items())


def whole_or_absent(output: Path) -> None:
    if output.exists():
        Calibration.load(output)


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())
def test_killed_and_resumed_gives_the_same_numbers(
    tmp_path: Path, death: Death, uninterrupted: Calibration
) -> None:
    output = tmp_path / "calibration"
    assert kill(output, None, death) == -signal.SIGKILL
    assert (tmp_path / "calibration.partial").is_dir()
    whole_or_absent(output)
    assert_identical(calibrated(output, None), uninterrupted)
    assert_identical(Calibration.load(output), uninterrupted)
    assert not (tmp_path / "calibration.partial").exists()


@pytest.mark.parametrize("death", [Death(RUN, "add_gradients", 4), Death(RUN, "add_scores", 4)])
def test_text_from_a_file_resumes_too(
    tmp_path: Path, text: Path, death: Death, uninterrupted_from_file: Calibration
) -> None:
    output = tmp_path / "calibration"
    assert kill(output, text, death) == -signal.SIGKILL
    assert_identical(calibrated(output, text), uninterrupted_from_file)


def test_killed_twice(tmp_path: Path, uninterrupted: Calibration) -> None:
    output = tmp_path / "calibration"
    for death in (Death(RUN, "add_gradients", 4), Death(RUN, "add_scores", 3)):
        assert kill(output, None, death) == -signal.SIGKILL
    assert_identical(calibrated(output, None), uninterrupted)


def test_work_is_taken_up_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "calibration"
    assert kill(output, None, Death(RUN, "add_scores", 5)) == -signal.SIGKILL
    calls = {"add_gradients": 0, "add_scores": 0}
    for name in calls:
        original = getattr(run, name)

        def counted(*args: object, name: str = name, original: object = original) -> None:
            calls[name] += 1
            original(*args)  # type: ignore[operator]

        monkeypatch.setattr(run, name, counted)
    windows = calibrated(output, None).windows()
    assert calls == {"add_gradients": 0, "add_scores": len(windows) - 5}


def test_other_settings_start_over(tmp_path: Path, uninterrupted: Calibration) -> None:
    output = tmp_path / "calibration"
    assert kill(output, None, Death(RUN, "add_scores", 5)) == -signal.SIGKILL
    changed = calibrated(output, None, dense_prefix=9)
    assert_identical(changed, calibrated(None, None, dense_prefix=9))
    assert changed.document != uninterrupted.document


@pytest.mark.parametrize("tokens", [600, 1500])
def test_what_a_deletion_left_behind_is_not_taken_up(tmp_path: Path, tokens: int) -> None:
    output = tmp_path / "calibration"
    assert kill(output, None, Death(RUN, "add_scores", 5)) == -signal.SIGKILL
    (tmp_path / "calibration.partial" / "settings.json").unlink()
    assert_identical(calibrated(output, None, tokens=tokens), calibrated(None, None, tokens=tokens))


def test_a_failure_keeps_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Calibration
) -> None:
    output = tmp_path / "calibration"
    calibrated(output, None)
    assert kill(output, None, Death(RUN, "add_scores", 5)) == -signal.SIGKILL
    assert_identical(Calibration.load(output), uninterrupted)
    assert json.loads((output / "calibration.json").read_text())["tokens"] == 1024
