"""One report of a tiny model, with everything in it, for all tests here."""

import json
from pathlib import Path

import pytest

import wina
from tests.helpers import english
from wina.cli import main
from wina.models import load_model
from wina.report import Report

Made = tuple[Path, Report]  # the page, and its numbers


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions in the published form of PIQA."""
    folder = tmp_path_factory.mktemp("questions")
    words = english(4_000).split()
    rows = [
        {"goal": " ".join(words[i : i + 5]), "sol1": words[i + 5], "sol2": words[i + 7]}
        for i in range(0, 48, 4)
    ]
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "valid-labels.lst").write_text("\n".join(str(i % 2) for i in range(len(rows))))
    return folder


@pytest.fixture(scope="session")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    qwen3: Path,
    text: Path,
    questions: Path,
) -> Made:
    """The report as the command line makes it."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra report)")
    loaded = load_model(str(qwen3))
    calibration = tmp_path_factory.mktemp("calibrations") / "windows"  # enough of them for bounds
    wina.calibrate(
        loaded.model,
        loaded.tokenizer,
        text,
        output=calibration,
        name=str(qwen3),
        tokens=3072,
        context=64,
        dense_prefix=4,
    )
    page = tmp_path_factory.mktemp("report") / "report.html"
    other = page.with_name("other.txt")
    other.write_text(english(30_000)[-10_000:], encoding="utf-8")
    arguments = [
        *("report", qwen3, "--calibration", calibration, "--method", "wina,teal"),
        *("--sparsities", "0.5", "--text", text, "--tokens", "900", "--context", "100"),
        *("--dense-prefix", "4", "--tasks", "piqa", "--task-data", questions),
        *("--prompt", "<b>50 %</b> & more?", "--prompt", "hello", "--max-new-tokens", "12"),
        *("--rounds", "2", "--baselines", "own-compiled", "--max-kl", "0.02"),
        *("--limit-text", other, "-o", page),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        with pytest.raises(SystemExit) as ending:
            main([str(x) for x in arguments])
        assert ending.value.code in (0, None)
    return page, Report.model_validate_json(page.with_suffix(".json").read_text(encoding="utf-8"))
