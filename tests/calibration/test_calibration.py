import json
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import wina
from tests.helpers import CONTEXT, make_tokenizer
from tests.layers.test_swap import assert_same, fingerprint
from wina.calibration import (
    Calibration,
    CalibrationSettings,
    DatasetText,
    DefaultText,
    DocsText,
    FileText,
    MixedText,
    SelfText,
    default_text,
)
from wina.calibration.artifact import Verdict
from wina.calibration.planning import TOLERANCE
from wina.calibration.text import OPENERS, _docstrings
from wina.errors import UsageError, WinaError
from wina.layers import SparsityCounter, scoring

Made = tuple[Path, Calibration]


@pytest.fixture
def folder(calibration: Made, tmp_path: Path) -> Path:
    return calibration[1].save(tmp_path / "calibration")


def test_a_calibration_survives_its_folder(calibration: Made) -> None:
    found, wanted = Calibration.load(calibration[0]), calibration[1]
    assert found.document == wanted.document
    assert (found.tokens == wanted.tokens).all()
    for one, other in zip(found.statistics, wanted.statistics, strict=True):
        assert one.site == other.site
        assert torch.equal(one.column_norm, other.column_norm)
        assert all(torch.equal(one.histograms[k], other.histograms[k]) for k in other.histograms)


def test_a_folder_holds_no_activations(calibration: Made) -> None:
    size = sum(x.stat().st_size for x in calibration[0].iterdir())
    assert size < 1_000_000
    assert sorted(x.name for x in calibration[0].iterdir()) == [
        "calibration.json",
        "statistics.safetensors",
        "tokens.npy",
    ]


def test_windows_start_as_a_text_does_and_do_not_overlap(
    model: PreTrainedModel, text: Path
) -> None:
    tokenizer = make_tokenizer(bos=True)
    made = wina.calibrate(model, tokenizer, text, tokens=512, context=100, verdict=False)
    document = made.document
    assert document.start == [0]
    assert document.window == 99
    for held_out in (False, True):
        windows = made.windows(held_out)
        assert all(window.shape == (1, 100) and window[0, 0] == 0 for window in windows)
        joined = torch.cat([window[0, 1:] for window in windows]).numpy()
        first = document.tokens if held_out else 0
        assert (joined == made.tokens[first : first + len(joined)]).all()
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert made.tokens.tolist() == ids[: len(made.tokens)]


def test_calibrating_leaves_the_model_as_it_was(each_model: PreTrainedModel, text: Path) -> None:
    before = fingerprint(each_model)
    wina.calibrate(each_model, make_tokenizer(), text, tokens=512, context=64)
    assert_same(fingerprint(each_model), before)


def test_the_models_context_limits_the_windows(model: PreTrainedModel, text: Path) -> None:
    made = wina.calibrate(model, make_tokenizer(), text, tokens=4096, context=9999, verdict=False)
    assert made.document.window == CONTEXT


def test_own_text_is_reproducible_and_depends_on_the_seed(model: PreTrainedModel) -> None:
    settings = {"tokens": 512, "context": 64, "verdict": False, "gradient": False}
    one, same, other = (
        wina.calibrate(model, make_tokenizer(), seed=seed, **settings)  # type: ignore[arg-type]
        for seed in (5, 5, 6)
    )
    assert (one.tokens == same.tokens).all()
    assert (one.tokens != other.tokens).any()


def test_a_short_text_is_used_as_far_as_it_goes(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one two three four five six seven eight nine ten\n" * 40)
    made = wina.calibrate(model, make_tokenizer(), path, tokens=4096, context=64, verdict=False)
    assert 512 <= made.document.tokens + made.document.held_out < 4096
    assert made.document.held_out >= 64
    assert "the text ends after" in capsys.readouterr().err


def test_statistics_may_read_a_part_of_the_text_evenly_spread(
    model: PreTrainedModel, text: Path
) -> None:
    options = {"tokens": 1024, "context": 64, "dense_prefix": 4, "verdict": False}
    whole = wina.calibrate(model, make_tokenizer(), text, **options)
    part = wina.calibrate(model, make_tokenizer(), text, statistics_tokens=512, **options)
    counts = [x.statistics[0].histograms["wina"].sum().item() for x in (whole, part)]
    assert counts == [16 * 60 * 32, 8 * 60 * 32]
    assert (whole.tokens == part.tokens).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics_tokens": 0}, "at least one token"),
        ({"tokens": 100}, "at least 512"),
        ({"dense_prefix": -1}, "dense prefix"),
        ({"context": 10, "dense_prefix": 9}, "dense prefix"),
        ({"tokens": 512, "dense_prefix": 300}, "leaves nothing to count"),
    ],
)
def test_settings_that_make_no_sense(
    model: PreTrainedModel, text: Path, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        wina.calibrate(model, make_tokenizer(), text, **settings)


def test_a_dense_prefix_beyond_what_a_short_text_leaves(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one two three four five six seven eight nine ten\n" * 30)  # 1,020 tokens
    with pytest.raises(UsageError, match="leaves nothing to count of windows of 127"):
        wina.calibrate(model, make_tokenizer(), path, tokens=9999, dense_prefix=126)


def test_several_files_follow_one_another(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer, paths = make_tokenizer(), []
    for name in ("a", "b"):
        paths.append(tmp_path / name)
        paths[-1].write_text(f"this is file {name}\n" * 99)
    pieces = list(FileText(tuple(paths)).pieces(model, tokenizer, [], 0))
    joined = "".join(tokenizer.decode(piece) for piece in pieces)
    assert joined == paths[0].read_text() + paths[1].read_text()


def test_a_long_file_is_read_in_pieces_and_nothing_is_lost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wina.calibration.text.PIECE", 64)
    for content in ("line of words\n" * 50 + "no newline at the end", "x" * 1000):
        path = tmp_path / "text"
        path.write_text(content)
        pieces = list(FileText((path,)).pieces(model, tokenizer, [], 0))
        assert len(pieces) > 2
        assert "".join(tokenizer.decode(piece) for piece in pieces) == content


def test_sources_take_turns_until_all_have_ended(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer, sources = make_tokenizer(), []
    for name, count in (("a", 10), ("b", 3)):
        path = tmp_path / name
        path.write_text(f"{name}" * count)
        sources.append(FileText((path,)))
    mixed = MixedText(tuple(sources), turn=4)
    pieces = [tokenizer.decode(piece) for piece in mixed.pieces(model, tokenizer, [], 0)]
    text = "".join(pieces)
    assert (text.count("a"), text.count("b")) == (10, 3)
    assert pieces[0].strip("a") == ""
    assert pieces[1].strip("b") == ""
    assert all(source.describe() in mixed.describe() for source in sources)


def test_a_dataset_is_streamed_row_by_row(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "first row"}, {"text": "second row"}, {"other": "x"}]
    fake = types.ModuleType("datasets")
    fake.__spec__ = ModuleSpec("datasets", None)
    asked: list[object] = []

    def load_dataset(name: str, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, split, streaming))
        if name == "gone":
            raise OSError("not there")
        return iter(rows)

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    tokenizer = make_tokenizer()
    pieces = DatasetText("someone/text").pieces(model, tokenizer, [], 0)
    assert [tokenizer.decode(next(pieces)) for _ in range(2)] == ["first row\n", "second row\n"]
    assert asked == [("someone/text", "train", True)]
    with pytest.raises(WinaError, match="no column 'text'"):
        next(pieces)
    with pytest.raises(WinaError, match="cannot read the dataset 'gone'"):
        next(DatasetText("gone").pieces(model, tokenizer, [], 0))


def test_an_instruct_models_own_text_has_users_turns(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer(template=True)
    piece = next(SelfText(batch=4, length=32).pieces(model, tokenizer, [], 0))
    rows = [tokenizer.decode(piece[i : i + 32]) for i in range(0, 128, 32)]
    assert [row.startswith("<s>user: ") for row in rows] == [False, True, False, False]


def test_own_text_goes_on_anew_and_begins_anywhere(model: PreTrainedModel) -> None:
    def first_pieces(first: int, count: int) -> list[list[int]]:
        pieces = SelfText(batch=2, length=16).pieces(model, make_tokenizer(), [], first)
        return [list(next(pieces)) for _ in range(count)]

    pieces = first_pieces(0, 4)
    assert len({tuple(piece) for piece in pieces}) == 4
    assert first_pieces(2, 2) == pieces[2:]


def test_docstrings_are_text_that_begins_anywhere(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()

    def first_pieces(first: int, count: int) -> list[list[int]]:
        pieces = DocsText(256).pieces(model, tokenizer, [], first)
        return [list(next(pieces)) for _ in range(count)]

    pieces = first_pieces(0, 4)
    assert {len(piece) for piece in pieces} == {256}
    assert first_pieces(2, 2) == pieces[2:]
    text = tokenizer.decode([token for piece in pieces for token in piece])
    assert text in "".join(f"{one}\n\n" for one in islice(_docstrings(), 20))


def test_docstrings_begin_again(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wina.calibration.text._docstrings", lambda: iter(["abc", "de"]))
    tokenizer = make_tokenizer()
    piece = next(DocsText(20).pieces(model, tokenizer, [], 0))
    assert len(piece) == 20
    assert ("abc\n\nde\n\n" * 3).startswith(tokenizer.decode(piece))


def test_the_default_text_has_rows_of_both_kinds(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    source = default_text(3, batch=2, length=16)
    assert isinstance(source, DefaultText)
    pieces = source.pieces(model, tokenizer, [], 1)
    ids = torch.tensor(next(pieces)).reshape(2, 2, 16)
    written = next(SelfText(3, 2, 16).pieces(model, tokenizer, [], 1))
    docs = next(DocsText(32).pieces(model, tokenizer, [], 1))
    assert ids[:, 0].flatten().tolist() == written
    assert ids[:, 1].flatten().tolist() == docs
    assert all(one.describe() in source.describe() for one in (SelfText(3, 2, 16), DocsText()))
    monkeypatch.setattr("wina.calibration.text._library", lambda: tmp_path)  # no sources there
    assert default_text(3, batch=2, length=16) == SelfText(3, 4, 16)


def test_a_template_that_refuses_is_no_template(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert len(next(SelfText(batch=2, length=8).pieces(model, tokenizer, [0], 0))) == 16


def test_own_text_is_what_the_model_predicts(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    longest = max(len(tokenizer(opener)["input_ids"]) for opener in OPENERS) + 1
    cold = SelfText(batch=4, length=longest + 10, temperature=1e-6)
    piece = next(cold.pieces(model, tokenizer, [0], 0))
    free, *opened = torch.tensor(piece).reshape(4, -1)
    for row, given in [(free, 2), *((row, longest) for row in opened)]:
        assert row[0] == 0
        predicted = model(row[None]).logits[0].argmax(-1)
        assert row[given:].tolist() == predicted[given - 1 : -1].tolist()


def test_own_text_begins_like_texts_of_many_kinds(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    piece = next(SelfText(batch=16, length=64).pieces(model, tokenizer, [0], 0))
    rows = [tokenizer.decode(piece[i + 1 : i + 64]) for i in range(0, 16 * 64, 64)]
    starts = [tokenizer.decode(tokenizer(opener)["input_ids"]) for opener in OPENERS]
    found = [[opener for opener in starts if row.startswith(opener)] for row in rows[4:]]
    assert all(found)
    assert len({opener for one in found for opener in one}) > 4


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no document": (lambda f: (f / "calibration.json").unlink(), "calibration.json is missing"),
    "half a document": (
        lambda f: (f / "calibration.json").write_text('{"schema'),
        "calibration.json is not valid JSON",
    ),
    "no statistics": (lambda f: (f / "statistics.safetensors").unlink(), "is missing"),
    "half the statistics": (
        lambda f: (f / "statistics.safetensors").write_bytes(
            (f / "statistics.safetensors").read_bytes()[:-50]
        ),
        "statistics.safetensors is damaged",
    ),
    "no tokens": (lambda f: (f / "tokens.npy").unlink(), "tokens.npy is missing or damaged"),
    "half the tokens": (
        lambda f: (f / "tokens.npy").write_bytes((f / "tokens.npy").read_bytes()[:-50]),
        "tokens.npy is missing or damaged",
    ),
    "tokens of another": (lambda f: np.save(f / "tokens.npy", np.zeros(3)), "does not fit"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(WinaError, match=message):
        Calibration.load(folder)


def test_missing_and_misshapen_statistics_are_named(folder: Path) -> None:
    path = folder / "statistics.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.layers.0.mlp.up_proj.column_norm")
    save_file(tensors, path)
    with pytest.raises(WinaError, match=r"lacks 'model.layers.0.mlp.up_proj.column_norm'"):
        Calibration.load(folder)
    save_file({**tensors, "model.layers.0.mlp.up_proj.column_norm": norm[:-1].clone()}, path)
    with pytest.raises(WinaError, match=r"wrong shapes for model.layers.0.mlp.up_proj"):
        Calibration.load(folder)


def test_another_schema_version(folder: Path) -> None:
    document = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps({**document, "schema_version": 2}))
    with pytest.raises(WinaError, match="schema version 2; this wina reads 1"):
        Calibration.load(folder)


def test_something_else_is_never_overwritten(
    calibration: Made, model: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("x")
    for path in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(UsageError, match="is not a calibration"):
            calibration[1].save(path)
        with pytest.raises(UsageError, match="is not a calibration"):
            wina.calibrate(model, make_tokenizer(), output=path)
    assert [x.name for x in tmp_path.iterdir()] == ["precious.txt"]


# Plans


@pytest.mark.parametrize("method", ["wina", "wina-kgate", "teal", "loss"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("selection", ["threshold", "topk"])
def test_any_plan_from_one_calibration_without_the_model(
    calibration: Made, method: str, allocation: str, selection: str
) -> None:
    for sparsity in (0.0, 0.3, 0.9):
        plan = calibration[1].plan(sparsity, method, allocation, selection)
        # Top-k rounds to whole channels, of 32 and 48.
        tolerance = 1e-4 if selection == "threshold" else 1 / 32
        assert plan.sparsity == pytest.approx(sparsity, abs=tolerance)
        assert plan.document.method == method
        assert plan.document.model == calibration[1].document.model


def test_the_head_is_planned_only_if_asked_for(calibration: Made) -> None:
    assert "lm_head" not in calibration[1].plan(0.5).vectors
    plan = calibration[1].plan(0.5, include_head=True, allocation="global")
    assert "lm_head" in plan.vectors
    assert plan.document.include_head
    assert plan.sparsity == pytest.approx(0.5, abs=1e-4)


def test_a_model_without_a_linear_head_says_so(calibration: Made) -> None:
    made = calibration[1]
    headless = Calibration(made.document, made.statistics[:-1], made.tokens)
    with pytest.raises(UsageError, match="no linear output head"):
        headless.plan(0.5, include_head=True)


@pytest.mark.parametrize(
    ("kl", "best"),
    [({"global": 1.0, "uniform": 1.0}, "global"), ({"global": 2.0, "uniform": 1.0}, "uniform")],
)
def test_the_default_allocation_is_the_verdicts(
    calibration: Made, kl: dict[str, float], best: str
) -> None:
    made = calibration[1]
    verdict = Verdict(method="wina", target_sparsity=0.5, kl=kl, sparsity=kl)
    judged = made.document.model_copy(update={"verdict": verdict})
    assert Calibration(judged, made.statistics, made.tokens).plan(0.4).document.allocation == best
    unjudged = made.document.model_copy(update={"verdict": None})
    plan = Calibration(unjudged, made.statistics, made.tokens).plan(0.4)
    assert plan.document.allocation == "uniform"


def test_the_verdict_is_measured_at_one_half(calibration: Made) -> None:
    verdict = calibration[1].document.verdict
    assert verdict is not None
    assert verdict.target_sparsity == 0.5
    assert verdict.sparsity == pytest.approx({"uniform": 0.5, "global": 0.5}, abs=TOLERANCE)
    assert all(kl > 0 for kl in verdict.kl.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.5, "method": "vina"}, "Did you mean 'wina'"),
        ({"sparsity": 0.5, "allocation": "globl"}, "Did you mean 'global'"),
        ({"sparsity": 0.5, "selection": "best"}, "unknown selection"),
        ({"sparsity": 0.5, "allocation": "greedy"}, "needs the model itself"),
        ({"sparsity": 0.5, "refine": True}, "needs the model itself"),
    ],
)
def test_bad_requests(calibration: Made, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibration[1].plan(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["wina", "loss"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("sparsity", [0.3, 0.65])
def test_refining_meets_the_target_on_held_out_text(
    calibration: Made, model: PreTrainedModel, method: str, allocation: str, sparsity: float
) -> None:
    made = calibration[1]
    plan = made.plan(sparsity, method, allocation, model=model, refine=True)
    assert plan.document.realized_sparsity == pytest.approx(sparsity, abs=TOLERANCE)
    with scoring(model, plan, made.document.dense_prefix), SparsityCounter(model) as counter:
        for window in made.windows(held_out=True):
            model(window, use_cache=False)
    assert counter.sparsity == plan.document.realized_sparsity


def test_refining_helps(calibration: Made, model: PreTrainedModel) -> None:
    made = calibration[1]
    rough = made.plan(0.65, "wina", "uniform")
    with scoring(model, rough, made.document.dense_prefix), SparsityCounter(model) as counter:
        for window in made.windows(held_out=True):
            model(window, use_cache=False)
    assert abs(counter.sparsity - 0.65) > TOLERANCE


def test_calibration_without_gradients(model: PreTrainedModel, text: Path) -> None:
    made = wina.calibrate(model, make_tokenizer(), text, tokens=512, context=64, gradient=False)
    assert made.document.verdict is None
    assert made.plan(0.5).document.allocation == "uniform"
    with pytest.raises(UsageError, match="--no-gradient"):
        made.plan(0.5, "loss")
    with pytest.raises(UsageError, match="--no-gradient"):
        made.plan(0.5, "wina", "global")


def test_what_no_gradient_reaches_stays_dense(
    model: PreTrainedModel, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A linear that only chooses, as the indexers of sparse attention do."""
    mlp = model.model.layers[1].mlp
    mlp.chooser = torch.nn.Linear(32, 3)
    plain = mlp.forward

    def choosing(x: torch.Tensor) -> torch.Tensor:
        return plain(x) * (1 + mlp.chooser(x).argmax(-1, keepdim=True))

    mlp.forward = choosing
    settings = {"tokens": 512, "context": 64, "dense_prefix": 4}
    made = wina.calibrate(model, make_tokenizer(), text, **settings)
    assert "no gradient reaches model.layers.1.mlp.chooser" in capsys.readouterr().err
    names = [linear.site.name for linear in made.statistics]
    assert "model.layers.1.mlp.chooser" not in names
    assert "model.layers.1.mlp.down_proj" in names
    assert "model.layers.1.mlp.chooser" not in made.plan(0.5, "loss", "global").vectors


def test_defaults_of_settings_hold_out_an_eighth() -> None:
    assert CalibrationSettings(tokens=16_384).held_out == 2_048
    assert CalibrationSettings(tokens=1_000_000).held_out == 8_192
    assert CalibrationSettings(tokens=512).held_out == 256
