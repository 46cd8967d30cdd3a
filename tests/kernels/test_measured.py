from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wina.kernels.measured import Measured
from wina.kernels.shapes import Shape, step_shapes, tiles_of

KIND = "sm_90/4"


@dataclass(frozen=True)
class Config:
    size: int


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measured[Config]:
    properties = SimpleNamespace(multi_processor_count=4, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    return Measured(tmp_path / "shipped.json", Config)


def test_what_was_measured_comes_before_the_rule(table: Measured[Config]) -> None:
    table.remember(KIND, {"a": Config(1), "b": None})
    assert [table.best(0, key, Config) for key in "abc"] == [Config(1), None, Config(4)]


def test_only_what_is_missing_is_tuned_and_kept_at_once(table: Measured[Config]) -> None:
    table.remember(KIND, {"b": Config(7)})
    asked: list[int] = []

    def tune(jobs: Sequence[int]) -> Iterator[Config | None]:
        for job in jobs:
            if job == 4:
                raise KeyboardInterrupt
            asked.append(job)
            yield None if job == 3 else Config(job)

    wanted = {"a": 1, "b": 2, "c": 3}
    with pytest.raises(KeyboardInterrupt):
        table.extend({"a": 1, "d": 4}, tune)
    assert asked == [1]
    found = table.extend(wanted, tune)
    assert asked == [1, 3]
    assert list(found.items()) == [("a", Config(1)), ("b", Config(7)), ("c", None)]
    assert table.of(KIND) == found
    table.extend(wanted, tune, again=True)
    assert asked == [1, 3, 1, 2, 3]
    assert table.of(KIND)["b"] == Config(2)


def test_shapes_of_a_layer() -> None:
    assert [shape.projections for shape in step_shapes(64, 96, 64, 32)] == [
        (96, 96),
        (64,),
        (64, 32, 32),
        (64,),
    ]
    gated = Shape(64, (96,), gated=True)
    assert gated.weights == 2 * 64 * 96
    assert gated.key(2, torch.bfloat16) == "gated 64->96 x2 16bit"
    assert tiles_of((128, 129, 1), 128) == [1, 2, 1]
