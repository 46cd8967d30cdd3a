"""The command that `wina serve` writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import wina
from tests.helpers import Cli, make_plan, write_model
from wina.errors import UsageError
from wina.integrations.vllm import serve
from wina.integrations.vllm.compressed import METHOD
from wina.integrations.vllm.serve import OVERRIDES, check_installed, command, preloads
from wina.models import load_model


def test_openmp_is_loaded_first_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.sys, "platform", "linux")
    monkeypatch.setattr(serve, "_on_cpu", lambda: True)
    assert preloads("", str(tmp_path)) == {}  # there is none
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert preloads("", str(tmp_path)) == {"LD_PRELOAD": str(library)}
    assert preloads("/a/b.so", str(tmp_path)) == {"LD_PRELOAD": f"/a/b.so:{library}"}
    assert preloads("/a/libgomp.so.1", str(tmp_path)) == {}
    monkeypatch.setattr(serve, "_on_cpu", lambda: False)
    assert preloads("", str(tmp_path)) == {}


@pytest.fixture
def plan(tmp_path: Path, qwen3: Path) -> Path:
    return make_plan(load_model(str(qwen3)).model, 0.1).save(tmp_path / "plan")


def given(arguments: list[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(arguments[arguments.index(OVERRIDES) + 1])
    return found


def test_a_plan_beside_a_model(plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = command("some/model", "plan", ["--port", "1234"])
    assert found[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]
    assert found[-2:] == ["--port", "1234"]
    config = {"quant_method": "wina", "plan": str(plan)}
    assert given(found) == {"quantization_config": config}


@pytest.mark.parametrize("arguments", [[OVERRIDES, '{"a": 1}'], [f'{OVERRIDES}={{"a": 1}}']])
def test_other_overrides_are_kept(plan: Path, arguments: list[str]) -> None:
    found = command("model", str(plan), arguments)
    assert found.count(OVERRIDES) == 1
    assert given(found).keys() == {"a", "quantization_config"}


@pytest.mark.parametrize("value", ["{", "[]"])
def test_other_overrides_that_are_none(plan: Path, value: str) -> None:
    with pytest.raises(UsageError, match="takes a JSON object"):
        command("model", str(plan), [OVERRIDES, value])


def test_two_plans(plan: Path) -> None:
    with pytest.raises(UsageError, match="not both"):
        command("model", str(plan), [OVERRIDES, '{"quantization_config": {}}'])


def test_a_saved_sparse_model(qwen3: Path, tmp_path: Path) -> None:
    model = load_model(str(qwen3)).model
    wina.sparsify(model, make_plan(model, 0.1), check=False)
    model.save_pretrained(tmp_path / "sparse")
    folder = str(tmp_path / "sparse")
    assert command(folder, None, ["-x"])[3:] == ["--model", folder, "-x"]


def test_a_saved_model_on_weights_that_are_refused(qwen3: Path, tmp_path: Path) -> None:
    model = load_model(str(qwen3)).model
    wina.sparsify(model, make_plan(model, 0.1), check=False)
    model.save_pretrained(tmp_path / "sparse")
    place = tmp_path / "sparse" / "config.json"
    config = json.loads(place.read_text())
    for base, message in (
        ({"quant_method": "gptq", "bits": 4}, "by another method, gptq"),
        ({"quant_method": METHOD, "quantization_status": "decompressed"}, "compress_model"),
    ):
        config["quantization_config"]["base"] = base
        place.write_text(json.dumps(config))
        with pytest.raises(UsageError, match=message):
            command(str(tmp_path / "sparse"), None)


def test_a_dense_model_alone(qwen3: Path) -> None:
    with pytest.raises(UsageError, match="--plan"):
        command(str(qwen3), None)


@pytest.mark.parametrize(
    ("options", "message"), [({"keep": 0.5}, "selection 'topk'"), ({"head": True}, "lm_head")]
)
def test_plans_that_vllm_does_not_run(
    qwen3: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    made = make_plan(load_model(str(qwen3)).model, 0.1, keep=options.get("keep"))
    if "head" in options:
        name, linear = next(iter(made.document.linears.items()))
        made.document.linears["lm_head"] = linear.model_copy(update={"block": None})
        made.vectors["lm_head"] = made.vectors[name].clone()
    folder = made.save(tmp_path / "plan")
    with pytest.raises(UsageError, match=message):
        command("model", str(folder))


def test_the_command_line(cli: Cli, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = cli("serve", "model", "--plan", str(plan), "--print", "--max-model-len", "64")
    assert ran.code == 0
    assert shlex.split(ran.out)[-2:] == ["--max-model-len", "64"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = cli("serve", "model", "--plan", str(plan))
    assert ran.code == 2
    assert "vLLM is not installed" in ran.err
    assert cli("serve", "model", "--plan", str(plan / "none"), "--print").code == 1


def test_a_vllm_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("wina.integrations.vllm.serve.version", lambda name: "0.29.1")
    with pytest.raises(UsageError, match=r"this is vLLM 0\.29\.1"):
        check_installed()


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    (folder / "config.json").unlink()
    with pytest.raises(wina.WinaError, match="holds no model"):
        command(str(folder), None)
