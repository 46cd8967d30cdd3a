"""benchmarks/piqa_table.py, with a tiny model and a tiny set of questions."""

import json
import runpy
from pathlib import Path

import pytest

import wina
from tests.helpers import english
from wina.evaluation.tasks import paired_difference

SCRIPT = Path(__file__).parents[2] / "benchmarks/piqa_table.py"


@pytest.mark.slow
def test_table(
    calibration: tuple[Path, wina.Calibration],
    qwen3: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    data, plans, out = tmp_path / "data", tmp_path / "plans", tmp_path / "table.json"
    data.mkdir()
    words = english(4_000).split()
    rows = [
        {"goal": " ".join(words[i : i + 5]), "sol1": words[i + 5], "sol2": words[i + 7]}
        for i in range(0, 48, 4)
    ]
    (data / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "valid-labels.lst").write_text("\n".join(str(i % 2) for i in range(len(rows))))
    for target in (0.7, 0.4):
        calibration[1].plan(target).save(plans / f"at-{target:.0%}")
    script = runpy.run_path(str(SCRIPT))
    script["main"](
        plans,
        task_data=data,
        model=str(qwen3),
        calibration=calibration[0],
        recipe=["wina/uniform"],
        sparsities="0.5",
        device="cpu",
        dtype="float32",
        json_to=out,
    )
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    found = json.loads(out.read_text())
    assert found["names"] == ["wina (at-40%)", "wina, uniform", "wina (at-70%)"]
    assert len(lines) == 2 + 1 + 3
    dense = found["dense"]["tasks"]["piqa"]["metrics"]["acc_norm,none"]
    assert (
        lines[2] == f"| | dense | | {100 * dense['value']:.1f} ± {100 * dense['stderr']:.1f} | | |"
    )
    for name, one, line in zip(found["names"], found["results"], lines[3:], strict=True):
        metric = one["tasks"]["piqa"]["metrics"]["acc_norm,none"]
        mean, error = paired_difference(metric["questions"], dense["questions"])
        assert f"| {name} | {100 * one['sparsity']:.1f} % | {100 * metric['value']:.1f}" in line
        assert f"| {100 * mean:+.1f} ± {100 * error:.1f} |" in line
    with pytest.raises(wina.errors.UsageError, match="no plan"):
        script["plans_in"](data)
