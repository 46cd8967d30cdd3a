from pathlib import Path

import pytest
import torch

from tests.helpers import make_model
from wina.errors import WinaError
from wina.models import identify, load_model
from wina.models.loading import folder_of, load_config


def test_a_folder_is_loaded_as_it_is(qwen3: Path) -> None:
    loaded = load_model(str(qwen3))
    assert loaded.name == str(qwen3)
    assert loaded.revision is None
    assert not loaded.model.training
    assert identify(loaded.model, "x") == identify(make_model("qwen3"), "x")
    assert loaded.tokenizer.chat_template


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(qwen3: Path, dtype: str) -> None:
    assert load_model(str(qwen3), dtype=dtype).model.dtype == getattr(torch, dtype)


def test_auto_is_the_checkpoints_dtype(tmp_path: Path, qwen3: Path) -> None:
    loaded = load_model(str(qwen3), dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model.dtype == torch.bfloat16


def test_a_config_without_the_weights(qwen3: Path, tmp_path: Path) -> None:
    assert load_config(str(qwen3)).hidden_size == 32
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WinaError, match="cannot load the config"):
        load_config(str(tmp_path))


def test_where_other_programs_load_from(qwen3: Path, tmp_path: Path) -> None:
    assert folder_of(str(qwen3)) == str(qwen3)
    assert folder_of("some/model") == "some/model"
    with pytest.raises(WinaError, match="holds no model"):
        folder_of(str(tmp_path))
