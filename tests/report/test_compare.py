"""Two runs side by side."""

import json
import math
from pathlib import Path

import pytest

from tests.helpers import Cli
from tests.report.conftest import Made
from wina.errors import UsageError, WinaError
from wina.report import Report, compare_runs, read_run


def changed(made: Made, folder: Path) -> Path:
    """Write a report like ``made`` whose first plan is worse by a known amount in each window."""
    report = made[1].model_copy(deep=True)
    row = report.quality.results[0]
    for number, window in enumerate(row.windows):
        window.nll += window.positions * (0.1 if number % 2 else 0.3)
    row.perplexity += 1
    assert report.tasks is not None
    for name, metric in report.tasks.results[0].tasks["piqa"].metrics.items():
        if name.startswith("acc,"):
            assert metric.questions is not None
            metric.questions[0] = 1 - metric.questions[0]
            metric.value = sum(metric.questions) / len(metric.questions)
    path = folder / "second.json"
    path.write_text(report.model_dump_json())
    return path


def test_differences_are_paired(made: Made, tmp_path: Path) -> None:
    first, second = made[0].with_suffix(".json"), changed(made, tmp_path)
    found = compare_runs(read_run(first), read_run(second))
    assert not found.settings
    row = made[1].quality.results[0]
    plan = found.plans[1]
    assert plan.plan.startswith(row.method)
    by_name = {change.name: change for change in plan.changes}
    assert by_name["perplexity"].difference == pytest.approx(1)
    assert by_name["sparsity"].difference == 0
    assert by_name["tokens/s"].difference == 0
    sizes = [window.positions for window in row.windows]
    extra = [0.1 if i % 2 else 0.3 for i in range(len(sizes))]
    mean = sum(x * n for x, n in zip(extra, sizes, strict=True)) / sum(sizes)
    likelihood = by_name["NLL, nats a token"]
    assert likelihood.difference == pytest.approx(mean)
    spread = sum((n * (x - mean)) ** 2 for x, n in zip(extra, sizes, strict=True))
    count = len(sizes)
    wanted = math.sqrt(spread * count / (count - 1)) / sum(sizes)
    assert likelihood.stderr == pytest.approx(wanted)
    accuracy = by_name["piqa, acc"]
    assert accuracy.difference is not None
    assert abs(accuracy.difference) == pytest.approx(1 / 12)
    assert accuracy.stderr == pytest.approx(1 / 12)  # one of twelve questions differs
    assert by_name["piqa, acc_norm"].difference == 0


def test_other_texts_are_not_paired(made: Made, tmp_path: Path) -> None:
    report = made[1].model_copy(deep=True)
    report.quality.text_hash = "other"
    report.quality.context = 64
    report.quality.results.pop()
    path = tmp_path / "other.json"
    assert report.speed is not None
    report.speed.results.pop()
    path.write_text(report.model_dump_json())
    found = compare_runs(read_run(made[0].with_suffix(".json")), read_run(path))
    assert found.settings["context"] == ("100", "64")
    assert all(x.name != "NLL, nats a token" for plan in found.plans for x in plan.changes)
    last = found.plans[-1].changes  # of the plan that only one of them has
    assert any(x.second is None and x.first is not None for x in last)


def test_what_eval_prints_is_compared_too(
    made: Made, qwen3: Path, text: Path, tmp_path: Path, cli: Cli
) -> None:
    report = made[1]
    evaluation = json.loads(report.quality.model_dump_json())
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(evaluation))
    done = cli("compare", path, made[0].with_suffix(".json"), "--json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    changes = {x["name"]: x for x in content["plans"][1]["changes"]}
    assert changes["perplexity"]["difference"] == 0
    assert changes["tokens/s"]["first"] is None
    shown = cli("compare", path, made[0].with_suffix(".json"))
    assert shown.code == 0
    assert "NLL, nats a token" in shown.out
    assert "±" in shown.out


def test_files_of_another_kind_are_named(tmp_path: Path, made: Made, cli: Cli) -> None:
    with pytest.raises(UsageError, match="no file"):
        read_run(tmp_path / "none.json")
    for content, said in (("[]", "neither"), ("{", "not valid JSON"), ('{"dense": 1}', "schema")):
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(WinaError, match=said):
            read_run(path)
    newer = json.loads(made[1].model_dump_json())
    newer["schema_version"] = 2
    path.write_text(json.dumps(newer))
    with pytest.raises(WinaError, match="schema version 2"):
        read_run(path)
    done = cli("compare", tmp_path / "none.json", path)
    assert done.code == 2
    assert isinstance(made[1], Report)
