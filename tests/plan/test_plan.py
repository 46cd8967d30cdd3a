import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import wina
from tests.helpers import make_plan
from wina.errors import UsageError, WinaError
from wina.plan import Plan


@pytest.fixture
def plan(model: PreTrainedModel) -> Plan:
    return make_plan(model, lambda _name, width: torch.rand(width))


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    return plan.save(tmp_path / "plan")


def test_a_plan_survives_its_folder_bit_for_bit(plan: Plan, folder: Path) -> None:
    plan.vectors["model.layers.0.mlp.up_proj"][3] = torch.inf
    plan.save(folder)
    found = Plan.load(folder)
    assert found.document == plan.document
    assert all(torch.equal(found.vectors[name], vector) for name, vector in plan.vectors.items())
    assert sorted(x.name for x in folder.iterdir()) == [
        "README.md",
        "plan.json",
        "plan.safetensors",
    ]


def test_topk_plans_keep_their_counts(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = make_plan(model, 1.0, keep=0.25)
    found = Plan.load(plan.save(tmp_path / "plan"))
    assert {x.keep for x in found.document.linears.values()} == {8, 12}


def test_biases_are_kept_and_checked(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = make_plan(model, 0.3, bias=True)
    folder = plan.save(tmp_path / "plan")
    found = Plan.load(folder)
    assert found.biases.keys() == plan.biases.keys()
    assert all(torch.equal(found.biases[name], bias) for name, bias in plan.biases.items())
    name = next(iter(plan.biases))
    for vector, message in ((None, "disagree on"), (torch.ones(3), "has a wrong shape")):
        plan.save(folder)
        rewrite(folder, f"{name}.bias", vector)
        with pytest.raises(WinaError, match=message):
            Plan.load(folder)


def test_the_card_is_readable_by_the_hub(folder: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "wina"
    assert card.data.base_model == "tiny"
    assert "wina.Plan.load" in card.text


def test_sparsity_weighs_linears_by_their_weights(plan: Plan) -> None:
    linears = {
        name: x.model_copy(update={"sparsity": 1.0 if x.kind == "down_proj" else 0.0})
        for name, x in plan.document.linears.items()
    }
    sizes = {name: x.in_features * x.out_features for name, x in linears.items()}
    changed = Plan(plan.document.model_copy(update={"linears": linears}), plan.vectors)
    down = sum(size for name, size in sizes.items() if "down_proj" in name)
    assert changed.sparsity == pytest.approx(down / sum(sizes.values()))


def change(folder: Path, **values: Any) -> None:
    path = folder / "plan.json"
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema_version": 3}, "schema version 3; this wina reads 1 and 2"),
        ({"schema_version": None}, "schema version None"),
        ({"target_sparsity": 1.0}, "target_sparsity: Input should be less than 1"),
        ({"target_sparsity": -0.5}, "target_sparsity"),
        ({"selection": "surprise"}, "selection"),
        ({"linears": {}}, "linears"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"model": {"name": "x"}}, "model.config_hash: Field required"),
    ],
)
def test_a_document_against_the_schema_is_refused(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    change(folder, **values)
    with pytest.raises(WinaError, match=message) as error:
        Plan.load(folder)
    assert not isinstance(error.value, UsageError)


def test_a_missing_schema_version_is_refused(folder: Path) -> None:
    content = json.loads((folder / "plan.json").read_text())
    del content["schema_version"]
    (folder / "plan.json").write_text(json.dumps(content))
    with pytest.raises(WinaError, match="schema version None"):
        Plan.load(folder)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_missing_and_damaged_files_are_named(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WinaError, match=name):
        Plan.load(folder)
    (folder / name).unlink()
    with pytest.raises(WinaError, match=f"{name} is missing"):
        Plan.load(folder)


def rewrite(folder: Path, name: str, vector: torch.Tensor | None) -> None:
    tensors = load_file(folder / "plan.safetensors")
    del tensors[name]
    if vector is not None:
        tensors[name] = vector
    save_file(tensors, folder / "plan.safetensors")


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (None, "disagree on model.layers.0.mlp.up_proj"),
        (torch.ones(31), r"\(31,\) torch.float32, not \(32,\) float32"),
        (torch.ones(32, dtype=torch.float16), "float16, not"),
        (torch.full((32,), -1.0), "negative numbers or NaN"),
        (torch.full((32,), torch.nan), "negative numbers or NaN"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(
    folder: Path, vector: torch.Tensor | None, message: str
) -> None:
    rewrite(folder, "model.layers.0.mlp.up_proj", vector)
    with pytest.raises(WinaError, match=message):
        Plan.load(folder)


def test_keep_must_fit_the_selection(model: PreTrainedModel) -> None:
    plan = make_plan(model, 1.0, keep=0.5)
    linears = dict(plan.document.linears)
    name = next(iter(linears))
    for keep, message in ((None, "does not fit its selection"), (99, "more channels")):
        linears[name] = linears[name].model_copy(update={"keep": keep})
        with pytest.raises(WinaError, match=message):
            Plan(plan.document.model_copy(update={"linears": linears}), plan.vectors)


def test_something_else_is_never_overwritten(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UsageError, match="is not a plan"):
        plan.save(tmp_path)
    with pytest.raises(UsageError, match="is not a plan"):
        plan.save(tmp_path / "precious.txt")
    assert (tmp_path / "precious.txt").read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_and_an_older_plan_may_be_used(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    for _ in range(2):
        Plan.load(plan.save(tmp_path / "plan"))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "error",
    [OfflineModeIsEnabled("offline"), LocalEntryNotFoundError("not here"), OSError("no network")],
)
def test_a_hub_that_does_not_answer_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("wina.plan.plan.snapshot_download", fail)
    with pytest.raises(WinaError, match="there is no plan at 'someone/plan'"):
        Plan.load("someone/plan")


def test_a_name_that_is_neither_folder_nor_hub_id() -> None:
    with pytest.raises(WinaError, match="there is no plan at"):
        Plan.load("no/such/folder/anywhere")


def test_a_plan_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = {}

    def download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, revision=revision, files=allow_patterns)
        return str(folder)

    monkeypatch.setattr("wina.plan.plan.snapshot_download", download)
    assert wina.Plan.load("someone/plan", "v1").document.method == "wina"
    assert asked == {
        "repo_id": "someone/plan",
        "revision": "v1",
        "files": ["plan.json", "plan.safetensors"],
    }


def test_a_plan_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            calls.append(("create", (repo_id, private, exist_ok)))

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            calls.append(("upload", sorted(x.name for x in Path(folder_path).iterdir())))
            assert Plan.load(folder_path).document == plan.document
            return "https://example.org/someone/plan"

    monkeypatch.setattr("wina.plan.plan.HfApi", Api)
    assert plan.push_to_hub("someone/plan", private=True).endswith("someone/plan")
    assert calls == [
        ("token", None),
        ("create", ("someone/plan", True, True)),
        ("upload", ["README.md", "plan.json", "plan.safetensors"]),
    ]


def test_the_digest_tells_plans_apart(model: PreTrainedModel) -> None:
    plan = make_plan(model, 0.3)
    assert plan.digest == make_plan(model, 0.3).digest
    name = next(iter(plan.vectors))
    moved = {**plan.vectors, name: plan.vectors[name] + 0.1}
    others = [
        replace(plan, vectors=moved),
        make_plan(model, 0.3, bias=True),
        make_plan(model, 0.3, keep=0.5),
        make_plan(model, 0.3, keep=0.25),
        make_plan(model, 0.3, prefill="sparse"),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 6
