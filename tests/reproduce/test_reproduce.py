"""The grid: fills, goes on, refuses what does not fit, and reports what is in it."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import pytest

from tests.helpers import Cli
from wina.calibration import Calibration
from wina.methods import Method, methods
from wina.reproduce import Cell
from wina.reproduce import grid as grid_module
from wina.reproduce.grid import perplexity
from wina.reproduce.report import Entry, paired

OPTIONS = ("--tokens", 500, "--calibration-tokens", 512, "--context", 128, "--dense-prefix", 4)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").rglob("*.json")}


def test_a_grid_is_filled_and_goes_on(
    cli: Cli, qwen3: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tmp_path / "grid"

    def run(names: str, sparsities: str, *more: object, plots: str = "--no-plots") -> object:
        return cli(
            *("reproduce", "--models", qwen3, "--text", text, "--calibration-text", text),
            *("--methods", names, "--sparsities", sparsities, "-o", grid, plots, *OPTIONS, *more),
        )

    first = run("teal,cats", "0.3,0.6")
    assert first.code == 0, first.err  # type: ignore[attr-defined]
    before = files(grid)
    assert set(before) == {
        f"{name}-{s}-seed0.json" for name in ("teal", "cats") for s in (0.3, 0.6)
    }

    # More methods: what is done stays, and is not planned again.
    def fail(*_: object) -> None:
        raise AssertionError("planned again")

    teal = methods.get("teal")
    broken = Method(teal.name, teal.paper, teal.departures, fail)  # type: ignore[arg-type]
    monkeypatch.setitem(methods._entries, "teal", broken)
    monkeypatch.setattr(grid_module, "calibrate", fail)
    more = run("teal,cats,larosa", "0.3,0.6", plots="--plots")
    assert more.code == 0, more.err  # type: ignore[attr-defined]
    after = files(grid)
    assert {name: after[name] for name in before} == before
    assert len(after) == 6

    # A report on what is there computes nothing, and says so where there is nothing.
    part = run("teal,random", "0.3,0.6", "--no-fill")
    assert part.code == 0, part.err  # type: ignore[attr-defined]
    assert "random" not in (grid / "table.md").read_text()
    none = run("random", "0.3", "--no-fill")
    assert "holds none of these cells" in none.said  # type: ignore[attr-defined]
    assert run("teal,cats,larosa", "0.3,0.6").code == 0  # type: ignore[attr-defined]
    assert files(grid) == after

    rows = list(csv.DictReader((grid / "results.csv").read_text().splitlines()))
    assert [(row["method"], row["target"]) for row in rows] == [
        (name, target) for name in ("teal", "cats", "larosa") for target in ("0.3", "0.6")
    ]
    refused = next(row for row in rows if row["status"] == "refused")
    assert (refused["method"], refused["target"]) == ("cats", "0.6")
    assert "cannot reach" in refused["reason"]
    assert all(row["torch"] and row["device"] == "cpu" and row["seed"] == "0" for row in rows)
    cells = {
        (x.method, x.target): x
        for path in (grid / "cells").rglob("*.json")
        for x in [Cell(**json.loads(path.read_text()))]
    }
    for row in rows:
        cell = cells[row["method"], float(row["target"])]
        if cell.status == "done":
            wanted = math.exp(sum(cell.nll) / sum(cell.positions))
            assert float(row["perplexity"]) == pytest.approx(wanted)
    table = (grid / "table.md").read_text()
    assert "| cats | " in table
    assert " — |" in table
    assert "La RoSA, arXiv 2507.01299" in table
    svgs = sorted(path.name for path in grid.glob("*.svg"))
    assert svgs == ["qwen3-bytes.svg", "qwen3-sparsity.svg"]

    # The same calibration served all of it, and another grid is not mixed into this one.
    assert len(list((grid / "calibrations").iterdir())) == 1
    text_before = text.read_text()
    copy = tmp_path / text.name
    copy.write_text(text_before + " more")
    changed = run("larosa", "0.3", "--text", copy)
    assert "grid of other settings" in changed.said  # type: ignore[attr-defined]
    other = run("larosa", "0.3", "--search-tokens", 128)
    assert other.code == 2  # type: ignore[attr-defined]
    assert "grid of other settings" in other.said  # type: ignore[attr-defined]


def test_seeds(cli: Cli, qwen3: Path, text: Path, tmp_path: Path) -> None:
    done = cli(
        *("reproduce", "--models", qwen3, "--text", text, "--calibration-text", text, "--json"),
        *("--methods", "teal,wina", "--sparsities", "0.5", "-o", tmp_path / "grid"),
        *("--no-plots", *OPTIONS, "--seeds", "0,1,2", "--search-tokens", 128),
    )
    cells = [Cell(**x) for x in json.loads(done.out)["cells"]]
    # Greedy searches read other text under each seed; uniform wina has nothing to draw.
    assert [(x.method, x.seed) for x in cells] == [
        *(("teal", seed) for seed in range(3)),
        ("wina", 0),
    ]
    assert len({tuple(x.nll) for x in cells}) == 4
    table = (tmp_path / "grid" / "table.md").read_text()
    teal, wina = Entry(cells[:3]), Entry(cells[3:])
    values = [perplexity(x.nll, x.positions) for x in cells[:3]]
    mean, spread = statistics.mean(values), statistics.stdev(values)
    assert f"| teal | {mean:.4g} ± {spread:.2g} (" in table
    assert "seeds 0, 1, 2" in table
    difference, error = paired(wina, teal)
    assert f"| wina | {difference:+.4f} ± {error:.4f} |" in table


def test_several_processes_fill_the_same_grid(
    cli: Cli, qwen3: Path, text: Path, tmp_path: Path
) -> None:
    def cells(folder: str, *more: object) -> list[Cell]:
        done = cli(
            *("reproduce", "--models", qwen3, "--text", text, "--calibration-text", text),
            *("--methods", "teal,wina,cats", "--sparsities", "0.3,0.6", "-o", tmp_path / folder),
            *("--no-plots", "--json", *OPTIONS, "--search-tokens", 128, *more),
        )
        assert done.code == 0, done.err
        found = [Cell(**x) for x in json.loads(done.out)["cells"]]
        seconds = {"plan_seconds": 0.0, "score_seconds": 0.0}
        return [x.model_copy(update=seconds) for x in found]

    assert cells("two", "--processes", 2) == cells("one")
    assert len(list((tmp_path / "two" / "calibrations").iterdir())) == 1


def test_true_bytes_by_hand(cli: Cli, qwen3: Path, text: Path, tmp_path: Path) -> None:
    done = cli(
        *("reproduce", "--models", qwen3, "--text", text, "--calibration-text", text, "--json"),
        *("--methods", "wina,larosa", "--sparsities", "0.5", "-o", tmp_path / "grid"),
        *("--no-plots", *OPTIONS, "--reference", "wina"),
    )
    plain, rotated = json.loads(done.out)["cells"]
    linears = Calibration.load(tmp_path / "grid" / "calibrations" / "qwen3").linears(False)
    weights = sum(x.site.weights for x in linears)
    head = 320 * 32
    assert plain["dense_bytes"] == 4 * (weights + head)
    scales = sum(x.site.in_features for x in linears)
    assert plain["bytes"] == pytest.approx(4 * (weights / 2 + head + scales))
    # Two rotations of 32 x 32 in each of two blocks.
    assert rotated["bytes"] == pytest.approx(plain["bytes"] + 4 * 4 * 32 * 32)
    assert rotated["dense_nll"] == pytest.approx(plain["dense_nll"], rel=1e-5)


def cell(nll: list[float], positions: list[int]) -> Cell:
    return Cell(
        model="m",
        method="x",
        paper="",
        departures="",
        target=0.5,
        nll=nll,
        positions=positions,
        seed=0,
        dtype="",
        device="",
        versions={},
    )


def test_paired_differences_by_hand() -> None:
    one, other = cell([10, 22, 36], [10, 10, 10]), cell([10, 20, 30], [10, 10, 10])
    mean, error = paired(Entry([one]), Entry([other]))
    assert mean == pytest.approx((0 + 0.2 + 0.6) / 3)
    spread = [0 - mean, 0.2 - mean, 0.6 - mean]
    assert error == pytest.approx(math.sqrt(sum(x * x for x in spread) / 2 / 3))
    assert math.isnan(paired(Entry([cell([1], [1])]), Entry([cell([2], [1])]))[1])
    # Of several seeds, the mean of each window.
    again = cell([10, 18, 36], [10, 10, 10])
    mean, error = paired(Entry([one, again]), Entry([other]))
    assert mean == pytest.approx((0 + 0 + 0.6) / 3)
    assert error == pytest.approx(math.sqrt((0.04 + 0.04 + 0.16) / 2 / 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "wina-papr"), "Did you mean 'wina-paper'?"),
        (("--sparsities", "0.5,x"), "numbers separated by commas"),
        (("--seeds", "0.5"), "numbers separated by commas"),
        (("--sparsities", "0.5,1.5"), "sparsity must lie in"),
        (("--sparsities", "0"), "above 0"),
        (("--reference", "nothing"), "unknown method"),
        (("--processes", "0"), "at least one process"),
        (("--models", "a/x,b/x"), "one name in files"),
        (("--calibration-text", "missing.txt"), "there is no text file"),
    ],
)
def test_bad_requests_fail_before_long_work(
    cli: Cli, text: Path, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    result = cli("reproduce", "--text", text, "--no-plots", "-o", tmp_path / "grid", *options)
    assert result.code == 2
    assert message in result.said
    assert not (tmp_path / "grid" / "cells").exists()
    assert cli("reproduce", "-o", tmp_path / "grid").code == 2
