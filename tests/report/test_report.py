"""The numbers of a report, and the page that is made of them."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import wina
from tests.helpers import Cli, make_plan, make_tokenizer
from tests.report.conftest import Made
from wina.bench.operators import roofline
from wina.errors import UsageError
from wina.evaluation import Limits
from wina.models import LoadedModel, load_model
from wina.report import Report, ReportSettings, make_report, measure, render
from wina.report.plots import VARIABLES, Axis, Point, Series, _front, pareto
from wina.report.samples import compare_texts

SMALL = ReportSettings(
    tokens=300, context=100, dense_prefix=4, prompts=("hello",), new_tokens=4, speed=False
)


def test_it_holds_everything(made: Made) -> None:
    _, report = made
    count = len(report.plans)
    assert count == 3  # two methods, and what bisection found
    targets = [row.target_sparsity for row in report.quality.results]
    assert targets == sorted(targets)
    assert report.tasks is not None
    assert report.speed is not None
    assert [x.target_sparsity for x in report.tasks.results] == targets
    assert [x.sparsity for x in report.speed.results] == targets
    assert len({plan.name for plan in report.plans}) == count
    for sample in report.samples:
        assert [x.plan for x in sample.texts] == [None, *range(count)]
    assert report.command.startswith("wina report ")
    assert "--max-kl 0.02" in report.command
    assert not report.notes


def test_the_recommended_plan_keeps_its_limit(made: Made) -> None:
    _, report = made
    chosen = report.recommendation
    assert chosen.plan is not None
    other = made[0].with_name("other.txt")
    assert report.plans[chosen.plan].use == f"--max-kl 0.02 --limit-text {other} --method wina"
    assert "keeps it on held-out text and other.txt, each by itself (bisection)" in chosen.how
    assert "0.02" in chosen.limits
    row = report.quality.results[chosen.plan]
    assert row.method == "wina"
    assert 0 < row.target_sparsity < 0.5


def test_bytes_are_those_of_what_is_read(made: Made) -> None:
    _, report = made
    for row in report.quality.results:
        head = 320 * 32 * 4
        planned = row.dense_bytes - head
        thresholds = 2 * (6 * 32 + 48) * 4
        wanted = planned * (1 - row.sparsity) + head + thresholds
        assert row.bytes == pytest.approx(wanted)


def test_places_add_up_to_blocks(made: Made) -> None:
    _, report = made
    for row in report.quality.results:
        assert set(row.by_place) == set(row.by_kind)
        for block, share in row.by_block.items():
            shares = [by_block[block] for by_block in row.by_place.values()]
            assert min(shares) <= share <= max(shares)


def test_score_histograms_say_what_is_dropped(made: Made) -> None:
    """Scored on the same windows, the share below the threshold is the realized sparsity."""
    _, report = made
    scores = report.scores
    assert scores is not None
    places = report.quality.results[scores.plan].by_place
    below = sum(edge < 1 for edge in scores.edges)
    assert len(scores.histograms) == sum(map(len, places.values()))
    for one in scores.histograms:
        assert sum(one.shares) == pytest.approx(1, abs=1e-4)
        assert sum(one.shares[:below]) == pytest.approx(one.dropped, abs=1e-4)
        # Two of its ten windows, so not exactly the same.
        assert one.dropped == pytest.approx(places[one.kind][one.block], abs=0.08)
        for other, place in one.others.items():
            more = report.quality.results[other].by_place[one.kind][one.block]
            if report.quality.results[other].method == "wina":
                assert (place > 1) == (more > one.dropped) or abs(more - one.dropped) < 0.08


def test_operators_are_timed_dense_and_sparse(made: Made) -> None:
    _, report = made
    assert report.operators is not None
    found = report.operators.operators
    assert {x.kind for x in found} == set(report.quality.results[0].by_kind)
    assert {x.plan for x in found} == {None, *range(len(report.plans))}
    for x in found:
        assert x.microseconds > 0
        assert x.operations == pytest.approx(2 * (1 - x.sparsity) * x.in_features * x.out_features)
        if x.plan is None:
            size = x.in_features * x.out_features + x.in_features + x.out_features
            assert (x.sparsity, x.bytes) == (0, 4 * size)


def test_operators_see_the_inputs_that_the_model_gives_them(model: PreTrainedModel) -> None:
    ids = torch.arange(2, 20)[None]
    found = roofline(model, [make_plan(model, 0.0), make_plan(model, 1e9)], ids, rounds=1)
    assert {(x.plan, x.sparsity) for x in found.operators} == {(None, 0.0), (0, 0.0), (1, 1.0)}


def test_the_page_needs_nothing_else(made: Made) -> None:
    page = made[0].read_text(encoding="utf-8")
    assert "<script" not in page
    assert "@import" not in page
    for address in re.findall(r"""(?:src|href|xlink:href)=["']([^"']*)""", page):
        assert address.startswith(("#", "data:"))
    assert all(x.startswith("#") for x in re.findall(r"url\(([^)]*)\)", page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)


def test_colours_are_the_page_s(made: Made) -> None:
    page = made[0].read_text(encoding="utf-8")
    figures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(figures) > 20
    for figure in figures:
        assert not re.search(r"(?:fill|stroke): #", figure)
    for colour in VARIABLES:
        assert colour not in page


def test_what_users_and_models_write_is_text(made: Made) -> None:
    page = made[0].read_text(encoding="utf-8")
    assert "<b>50" not in page
    assert "<b>50\N{NO-BREAK SPACE}%</b> & more?" in html.unescape(page)


def test_the_page_is_made_from_the_numbers_alone(made: Made) -> None:
    assert render(made[1]) == made[0].read_text(encoding="utf-8")


def report_of(loaded: LoadedModel, plans: list[wina.Plan], **options: object) -> Report:
    return make_report(loaded, plans, SMALL, **options)  # type: ignore[arg-type]


@pytest.fixture
def loaded(qwen3: Path) -> LoadedModel:
    return load_model(str(qwen3))


def test_without_a_limit_the_scored_plans_are_judged(loaded: LoadedModel) -> None:
    nothing, everything = make_plan(loaded.model, 0.0), make_plan(loaded.model, 1e9)
    report = report_of(loaded, [nothing, everything], limits=Limits(kl=0.1))
    assert report.recommendation.plan is None  # too few windows
    assert "None is recommended" in render(report)
    longer = ReportSettings(**{**vars(SMALL), "tokens": 900})
    report = make_report(loaded, [nothing, everything], longer, limits=Limits(kl=0.1))
    assert report.recommendation.plan == 0
    assert "Speed was not measured." in report.notes
    assert "roofline" not in render(report)


def test_an_interrupted_report_goes_on(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [make_plan(loaded.model, 0.2), make_plan(loaded.model, 0.4)]
    output = tmp_path / "report.html"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "write_samples", interrupt)
        with pytest.raises(KeyboardInterrupt):
            report_of(loaded, plans, output=output)
    work = tmp_path / "report.html.partial"
    done = {path.name for path in work.iterdir()}
    assert {"quality-dense.json", "quality-0.json", "quality-1.json", "scores.json"} <= done
    with monkeypatch.context() as patch:
        patch.setattr("wina.evaluation.quality.score_plan", interrupt)  # is not called again
        again = report_of(loaded, plans, output=output)
    assert not work.exists()
    whole = report_of(loaded, plans)
    assert again.quality == whole.quality
    assert again.samples == whole.samples


def test_other_settings_start_afresh(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.html"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "write_samples", interrupt)
        with pytest.raises(KeyboardInterrupt):
            report_of(loaded, [make_plan(loaded.model, 0.2)], output=output)
    report = report_of(loaded, [make_plan(loaded.model, 0.6)], output=output)
    assert report.quality == report_of(loaded, [make_plan(loaded.model, 0.6)]).quality


def test_a_given_plan_is_used_from_where_it_is(loaded: LoadedModel) -> None:
    report = report_of(loaded, [make_plan(loaded.model, 0.2)], uses=["--plan 'my plan'"])
    assert f"wina run {loaded.name} --plan 'my plan' --compare" in html.unescape(render(report))


@pytest.mark.slow
def test_a_quantized_model(qwen3: Path, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("torchao")
    folder, page = tmp_path / "calibration", tmp_path / "report.html"
    common = (qwen3, "--quantize", "int8")
    done = cli("calibrate", *common, "--tokens", 512, "--context", 128, "-o", folder)
    assert done.code == 0, done.said
    arguments = ("--calibration", folder, "--sparsities", "0.5", "--method", "wina")
    small = ("--tokens", 300, "--context", 100, "--prompt", "hello", "--max-new-tokens", 4)
    done = cli("report", *common, *arguments, *small, "-o", page)
    assert done.code == 0, done.said
    report = Report.model_validate_json(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert report.model == f"{qwen3}, int8"
    use = f"wina run {qwen3} --quantize int8 --sparsity 0.5 --method wina"
    assert use in html.unescape(page.read_text(encoding="utf-8"))
    row = report.quality.results[0]
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 320 * 32
    assert weights < row.dense_bytes < 2 * weights  # a byte each, rows of 64, and scales
    assert any("Speed was not measured" in x for x in report.notes)


def test_plans_that_cannot_be_reported(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="at least one"):
        report_of(loaded, [])
    with pytest.raises(UsageError, match="threshold"):
        report_of(loaded, [make_plan(loaded.model, 1.0, keep=0.5)])
    plan = make_plan(loaded.model, 0.2)
    name = next(iter(plan.vectors))
    linears = {key: x for key, x in plan.document.linears.items() if key != name}
    document = plan.document.model_copy(update={"linears": linears})
    vectors = {key: x for key, x in plan.vectors.items() if key != name}
    fewer = replace(plan, document=document, vectors=vectors)
    with pytest.raises(UsageError, match="same linears"):
        report_of(loaded, [plan, fewer])


def test_bad_requests_are_refused_before_any_work(qwen3: Path, tmp_path: Path, cli: Cli) -> None:
    for arguments, said in (
        (("-o", tmp_path / "report.pdf"), "HTML file"),
        (("--sparsities", "0,0.5"), "above 0"),
        (("--sparsities", "half"), "numbers separated by commas"),
        (("--method", "winna"), "wina"),
        (("--plan", tmp_path, "--method", "wina"), "as they are"),
        (("--text", tmp_path / "none.txt"), "none.txt"),
        (("--rounds", 0), "at least 1"),
        (("--max-kl", -1), "above 0"),
    ):
        done = cli("report", qwen3, *arguments)
        assert done.code == 2, (arguments, done.err)
        assert said in done.said
        assert "loading" not in done.err


@pytest.mark.parametrize(
    ("text", "dense", "same"),
    [
        ("the cat sat", "the cat sat", None),
        ("the cat sat", "the dog ran", 2),
        ("the cat", "the cat sat on", 1),
        ("the cat sat on", "the cat", 1),
        ("naïve é", "naïve è", 1),  # bytes of one character in two tokens
        ("other", "the", 0),
        ("", "the", 0),
    ],
)
def test_texts_are_cut_where_they_part(text: str, dense: str, same: int | None) -> None:
    tokenizer = make_tokenizer()
    ids, theirs = tokenizer(text)["input_ids"], tokenizer(dense)["input_ids"]
    found = compare_texts(tokenizer, ids, theirs, 0)
    assert found.start + found.first + found.rest == text
    assert (found.same is None) == (same is None)
    assert dense.startswith(found.start)
    if same is not None and ids and len(ids) > (found.same or 0):
        assert ids[: found.same] == theirs[: found.same]
        assert found.first or not found.rest


def test_points_that_another_beats_are_known() -> None:
    x, y = Axis("price", True), Axis("loss", False)
    points = [Point(0, 1, 1), Point(1, 2, 2), Point(2, 1.5, 2.5), Point(3, 2, 2)]
    assert _front(points, x, y) == {0, 1, 3}
    assert _front(points, Axis("price", False), y) == {0}


def test_a_figure_tells_its_numbers_to_those_who_cannot_see_it() -> None:
    series = [Series("wina", [Point(0, 25.0, 18.0, (0.0, 0.5)), Point(1, 50.0, 22.0)])]
    figure = pareto(
        "f", Axis("sparsity", True, unit=" %"), Axis("perplexity", False, True), series,
        ["25 %", "50 %"], (0.0, 17.0), 1,
    )  # fmt: skip
    assert "Dense: 17" in figure.summary
    assert "50 %: 22 at 50 %" in figure.summary
    assert figure.svg.startswith("<svg")
    assert 'id="f-' in figure.svg
