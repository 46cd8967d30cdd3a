import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.helpers import make_model, make_plan
from wina.errors import WinaError
from wina.layers import sparsify
from wina.models import identify, identity
from wina.models.identity import files_hash


def test_where_and_how_a_model_was_loaded_does_not_matter(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    wanted = identify(model, "one")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = identify(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), "other")
        assert (found.config_hash, found.weights_hash) == (wanted.config_hash, wanted.weights_hash)
        assert found.dtype == str(dtype).removeprefix("torch.")
        wanted.check(found)


def test_one_changed_weight_is_another_model(model: PreTrainedModel) -> None:
    before = identify(model, "before")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 4] += 0.1
    after = identify(model, "after")
    assert after.config_hash == before.config_hash
    assert after.weights_hash != before.weights_hash
    with pytest.raises(WinaError, match=r"'after' is the same architecture with other weights"):
        before.check(after)


def test_another_architecture_says_so() -> None:
    found = identify(make_model("mistral"), "found")
    with pytest.raises(WinaError, match="another architecture or size"):
        identify(make_model("qwen3"), "wanted").check(found)


def test_being_sparse_changes_no_identity(model: PreTrainedModel) -> None:
    before = identify(model, "x")
    sparsify(model, make_plan(model, 0.5))
    assert identify(model, "x") == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_is_as_it_is_defined(model: PreTrainedModel, dtype: torch.dtype) -> None:
    tiny = [2.0**-14, -(2.0**-14), 6.1e-5, -6.1e-5, -0.0, 1e-30, float("inf"), float("nan")]
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[0, : len(tiny)] = torch.tensor(
            tiny
        )
    total = hashlib.sha256()
    for name, value in sorted(model.to(dtype).named_parameters()):
        rounded = value.detach().to(torch.bfloat16)
        rounded[rounded.abs() < 2.0**-14] = 0
        digest = hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()
        total.update(f"{name} {list(value.shape)} {digest}\n".encode())
    assert identify(model, "x").weights_hash == total.hexdigest()


@pytest.mark.parametrize("shards", ["1GB", "50KB"])
def test_files_have_the_hash_of_the_model(
    model: PreTrainedModel, shards: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "50KB")
    assert files_hash(tmp_path, model.config) == identify(model, "m").weights_hash
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert files_hash(tmp_path, model.config) == identify(model, "m").weights_hash


def test_files_are_read_once(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(identity, "_digest", lambda tensor: str(read.append(tensor)))
    model.save_pretrained(tmp_path)
    file, count = tmp_path / "model.safetensors", len(list(model.parameters()))
    found = files_hash(tmp_path, model.config)
    assert files_hash(tmp_path, model.config) == found
    assert len(read) == count
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert files_hash(tmp_path, model.config) == found
    assert len(read) == 2 * count


@pytest.mark.parametrize("content", [b"", b"ab", b"x" * 64, bytes([200]) * 64])
def test_a_damaged_entry_is_made_again(
    model: PreTrainedModel, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path / "cache"))
    model.save_pretrained(tmp_path)
    wanted = files_hash(tmp_path, model.config)
    (entry,) = (tmp_path / "cache" / "weights").iterdir()
    entry.write_bytes(content)
    assert files_hash(tmp_path, model.config) == wanted
    assert entry.read_text() == wanted


def test_a_cache_that_cannot_be_written(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("WINA_CACHE", str(tmp_path / "config.json"))
    assert files_hash(tmp_path, model.config) == identify(model, "m").weights_hash


def test_files_that_hold_something_else_have_no_hash(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    assert files_hash(tmp_path, model.config) is None
    tensors = {f"other.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert files_hash(tmp_path, model.config) is None
