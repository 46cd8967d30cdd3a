"""wina as a model of lm-evaluation-harness."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import make_tokenizer, write_model
from wina.errors import UsageError, WinaError
from wina.layers import phase_of

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")

from wina.integrations.lm_eval import Answers, WinaLM

TASK = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: [" one", " another"]
metric_list: [{{metric: acc}}]
"""


def test_the_harness_runs_a_plan(qwen3: Path, calibration: Any, tmp_path: Path) -> None:
    """The harness's own command line, in a process of its own."""
    plan = calibration[1].plan(0.5).save(tmp_path / "plan")
    rows = [{"text": f"a text with number {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "last_word.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    command = [
        *(sys.executable, "-m", "wina.integrations.lm_eval", "run", "--model", "wina"),
        *("--model_args", f"pretrained={qwen3},plan={plan},dtype=float32"),
        *("--tasks", "last_word", "--include_path", str(tmp_path), "--batch_size", "2"),
        *("--output_path", str(tmp_path / "results.json")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.rglob("results*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["last_word"]


def test_a_plan_of_another_model_is_refused(
    mistral: Path, calibration: Any, tmp_path: Path
) -> None:
    plan = calibration[1].plan(0.5).save(tmp_path / "plan")
    with pytest.raises(WinaError, match="another architecture"):
        WinaLM(str(mistral), str(plan))


def test_a_loaded_model_needs_its_tokenizer(model: Any) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        WinaLM(model)
    with pytest.raises(UsageError, match="batch_size"):
        WinaLM(model, tokenizer=make_tokenizer(), batch_size="auto")
    assert phase_of(model) is None


def test_texts_start_as_the_model_was_trained(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that forgets BOS is told to add it; the caller's stays as it is."""
    from transformers import AutoTokenizer

    folder = write_model(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr("wina.integrations.lm_eval.start_ids", lambda *_: [0])
    lm = WinaLM(model, tokenizer=tokenizer)
    assert lm.tok_encode("a text")[0] == 0
    assert tokenizer("a text")["input_ids"][0] != 0
    monkeypatch.setattr("wina.integrations.lm_eval.start_ids", lambda *_: [])
    assert WinaLM(model, tokenizer=tokenizer).tok_encode("a text")[0] != 0


def test_answers_are_kept_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = Answers(path)
    answers.add({"a": [-1.0, True], "b": [-2.0, False]}, 30, 100)
    answers.add({"c": "text"}, 10, 20)
    path.write_bytes(path.read_bytes() + b'{"answers": {"d"')
    found = Answers(path)
    assert found.sparsity is None
    assert found.take("a") == [-1.0, True]
    found.take("b")
    assert found.sparsity == 0.3
    assert found.take("c") == "text"
    assert found.sparsity == 40 / 120
    assert "d" not in found
    found.add({"d": "more"}, 0, 0)
    assert Answers(path).take("d") == "more"
