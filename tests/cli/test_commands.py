"""The commands on tiny models from disk: what a user types, and what comes out."""

import io
import json
import math
import subprocess
import sys
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import pytest
import torch

import wina
from tests.helpers import Cli, write_model
from wina.allocation import allocations
from wina.calibration import Calibration
from wina.criteria import Criterion, LinearFacts, criteria, register
from wina.plan import Plan

Made = tuple[Path, wina.Calibration]


def one_object(out: str) -> dict[str, Any]:
    """Return the only thing on standard output: one line of strict JSON."""
    assert out.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(out, parse_constant=refuse)
    assert isinstance(content, dict)
    return content


@pytest.fixture
def plan(calibration: Made, tmp_path: Path) -> Path:
    return calibration[1].plan(0.5).save(tmp_path / "plan")


def test_the_version_also_as_a_module(cli: Cli) -> None:
    said = f"wina {version('wina')}\n"
    assert (cli("--version").code, cli("--version").out) == (0, said)
    found = subprocess.run(
        [sys.executable, "-m", "wina", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == said


@pytest.mark.parametrize("which", ["qwen3", "mistral"])
def test_run_calibrates_plans_and_writes(
    which: str, cli: Cli, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    arguments = ("run", folder, "--prompt", "hello there", "--max-new-tokens", 8, "--json")
    done = cli(*arguments)
    assert done.code == 0, done.err
    content = one_object(done.out)
    assert list(content) == ["model", "prompt", "text", "method", "sparsity", "tokens_per_second"]
    assert content["model"] == str(folder)
    assert content["prompt"] == "hello there"
    assert content["method"] == "loss"
    assert content["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert content["tokens_per_second"] > 0
    assert "calibrating" in done.err
    again = cli(*arguments)
    assert "calibrating" not in again.err  # cached
    assert one_object(again.out)["text"] == content["text"]


def test_run_streams_text_to_stdout_and_notes_to_stderr(qwen3: Path, plan: Path, cli: Cli) -> None:
    arguments = ("run", qwen3, "--plan", plan, "--prompt", "hello", "--max-new-tokens", 8)
    text = one_object(cli(*arguments, "--json").out)["text"]
    done = cli(*arguments)
    assert done.code == 0
    assert done.out == text + "\n"
    assert "tokens/s" in done.err


def test_run_compares_and_scores(qwen3: Path, plan: Path, cli: Cli) -> None:
    arguments = ("run", qwen3, "--plan", plan, "--prompt", "hello", "--max-new-tokens", 8)
    content = one_object(cli(*arguments, "--compare", "--perplexity", "--json").out)
    assert set(content["dense"]) == {"text", "tokens_per_second"}
    quality = content["perplexity"]
    assert quality["sparse"] > 1
    assert quality["kl"] > 0
    assert 0.4 < quality["sparsity"] < 0.6
    shown = cli(*arguments, "--compare", "--perplexity")
    assert "dense" in shown.out
    assert "perplexity" in shown.out


def test_square_brackets_are_text(qwen3: Path, plan: Path, cli: Cli) -> None:
    arguments = ("run", qwen3, "--plan", plan, "--prompt", "a [/b] [red]c", "--max-new-tokens", 4)
    done = cli(*arguments, "--compare")
    assert done.code == 0, done.err
    assert "a [/b] [red]c" in done.out


def test_run_raw_leaves_the_template_out(qwen3: Path, plan: Path, cli: Cli) -> None:
    arguments = ("run", qwen3, "--plan", plan, "--prompt", "hello", "--max-new-tokens", 8)
    chat, raw = cli(*arguments, "--json"), cli(*arguments, "--json", "--raw")
    assert one_object(chat.out)["text"] != one_object(raw.out)["text"]


def test_run_samples_by_seed(qwen3: Path, plan: Path, cli: Cli) -> None:
    arguments = ("run", qwen3, "--plan", plan, "--temperature", 1, "--top-p", 0.9, "--json")
    texts = [
        one_object(cli(*arguments, "--seed", seed, "--max-new-tokens", 12).out)["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_run_at_zero_is_dense(qwen3: Path, calibration: Made, cli: Cli) -> None:
    done = cli(
        "run", qwen3, "--calibration", calibration[0], "--sparsity", 0, "--compare", "--json"
    )
    content = one_object(done.out)
    assert content["sparsity"] == 0
    assert content["text"] == content["dense"]["text"]


def test_run_perplexity_on_a_model_of_short_context(tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "gpt2", "gpt2")
    done = cli("run", folder, "--perplexity", "--max-new-tokens", 4, "--json")
    assert done.code == 0, done.err
    quality = one_object(done.out)["perplexity"]
    assert quality["dense"] > 1
    assert quality["kl"] > 0


def test_calibrate_plan_inspect_eval(mistral: Path, text: Path, tmp_path: Path, cli: Cli) -> None:
    """The long way, each step from the files of the one before."""
    made, planned = tmp_path / "calibration", tmp_path / "plan"
    options = ("--tokens", 1024, "--context", 128, "--dense-prefix", 4)
    done = cli("calibrate", mistral, "-o", made, "--text", text, *options, "--json")
    assert done.code == 0, done.err
    document = one_object(done.out)
    assert document["calibration"] == str(made)
    assert document["tokens"] == 1024
    assert document["start"] == [0]
    assert document["model"]["name"] == str(mistral)
    assert set(document["verdict"]["kl"]) == {"uniform", "global"}

    done = cli("plan", made, "--sparsity", 0.4, "--method", "loss", "-o", planned, "--json")
    assert done.code == 0, done.err
    content = one_object(done.out)
    assert content["plan"] == str(planned)
    assert content["expected_sparsity"] == pytest.approx(0.4, abs=1e-3)
    assert content["realized_sparsity"] is None
    assert Plan.load(planned).document.method == "loss"

    content = one_object(cli("inspect", planned, "--json").out)
    assert content["sparsity"] == pytest.approx(0.4, abs=1e-3)
    assert len(content["linears"]) == 14
    assert one_object(cli("inspect", made, "--json").out)["tokens"] == 1024
    assert "down_proj" in cli("inspect", planned).out
    assert "model.layers.1.mlp.down_proj" in cli("inspect", made).out

    scoring = ("--text", text, "--tokens", 500, "--context", 100)
    done = cli("eval", mistral, "--plan", planned, *scoring, "--json")
    assert done.code == 0, done.err
    content = one_object(done.out)
    assert content["model"] == str(mistral)
    assert content["dense"]["perplexity"] > 1
    (result,) = content["results"]
    wanted = {"method", "allocation", "selection", "target_sparsity", "sparsity"}
    assert wanted | {"perplexity", "kl", "top1_agreement"} <= set(result)
    assert result["method"] == "loss"
    assert result["sparsity"] == pytest.approx(0.4, abs=0.05)
    assert {"q_proj", "down_proj"} <= set(result["by_kind"])
    shown = cli("eval", mistral, "--plan", planned, *scoring)
    assert "sparsity by projection" in shown.out

    done = cli(
        "plan", made, "--allocation", "greedy", "--refine", "--model", mistral, "-o", planned
    )
    assert done.code == 0, done.err
    assert "on held-out text" in done.err
    assert Plan.load(planned).document.allocation == "greedy"


def test_eval_sweeps_methods_and_sparsities(
    qwen3: Path, calibration: Made, text: Path, cli: Cli
) -> None:
    done = cli(
        *("eval", qwen3, "--calibration", calibration[0], "--text", text, "--tokens", 400),
        *("--context", 100, "--sweep", "0.25,0.6", "--method", "teal,wina", "--json"),
        *("--allocation", "uniform", "--selection", "topk"),
    )
    assert done.code == 0, done.err
    rows = one_object(done.out)["results"]
    assert [(row["method"], row["target_sparsity"]) for row in rows] == [
        ("teal", 0.25),
        ("teal", 0.6),
        ("wina", 0.25),
        ("wina", 0.6),
    ]
    assert all(row["sparsity"] == pytest.approx(row["target_sparsity"], abs=0.02) for row in rows)
    assert rows[0]["kl"] < rows[1]["kl"]


@pytest.mark.parametrize(
    "kinds", [(), ("--self",), ("--docs",), ("--self", "--docs"), ("--self", "--text")]
)
def test_calibrate_on_text_of_several_kinds(
    kinds: tuple[str, ...], qwen3: Path, text: Path, tmp_path: Path, cli: Cli
) -> None:
    arguments = [*kinds, text] if "--text" in kinds else list(kinds)
    quick = ("--tokens", 512, "--no-gradient")
    done = cli("calibrate", qwen3, "-o", tmp_path / "c", *arguments, *quick)
    assert done.code == 0, done.err
    assert "tokens of" in done.err
    assert done.out == ""
    assert not (tmp_path / "c.partial").exists()
    source = Calibration.load(tmp_path / "c").document.source
    assert ("self: seed 0" in source) == (not kinds or "--self" in kinds)
    assert ("docstrings of Python" in source) == (not kinds or "--docs" in kinds)
    assert (text.name in source) == ("--text" in kinds)


def test_chat_keeps_the_conversation(
    qwen3: Path, plan: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wina.cli import chat

    seen: list[list[dict[str, str]]] = []
    original = chat.encode_chat

    def spy(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        seen.append(list(messages))
        return original(tokenizer, messages)

    monkeypatch.setattr(chat, "encode_chat", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n\nnever read\n"))
    done = cli("chat", qwen3, "--plan", plan, "--max-new-tokens", 5, "--system", "be brief")
    assert done.code == 0, done.err
    roles = ["system", "user", "assistant", "user"]
    assert [message["role"] for message in seen[-1]] == roles
    assert [message["content"] for message in seen[-1]][::3] == ["be brief", "again"]
    assert len(seen) == 2
    assert done.out.strip()


def test_chat_ends_with_its_input(
    qwen3: Path, plan: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli("chat", qwen3, "--plan", plan).code == 0


def test_plan_says_what_it_made(calibration: Made, tmp_path: Path, cli: Cli) -> None:
    done = cli("plan", calibration[0], "-o", tmp_path / "p", "--include-head")
    assert done.code == 0
    assert done.out == ""
    assert "50.0% expected" in done.err
    assert "lm_head" in Plan.load(tmp_path / "p").vectors


@pytest.fixture
def _outsider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "_entries", dict(criteria._entries))
    monkeypatch.setattr(allocations, "_entries", dict(allocations._entries))


@pytest.mark.usefixtures("_outsider")
def test_a_criterion_and_an_allocation_from_outside(
    qwen3: Path, text: Path, tmp_path: Path, cli: Cli
) -> None:
    def first_half(facts: LinearFacts) -> torch.Tensor:
        half = len(facts.column_norm) // 2
        return torch.cat([torch.full((half,), 1e-3), torch.ones(len(facts.column_norm) - half)])

    def odd_blocks(statistics: Any, _criterion: Criterion, target: float) -> torch.Tensor:
        shares = [2 * target * (x.site.block % 2) for x in statistics]
        return torch.tensor(shares, dtype=torch.float64)

    register(Criterion("own", first_half))
    allocations.add("odd", odd_blocks)
    made, planned = tmp_path / "c", tmp_path / "p"
    done = cli(
        *("calibrate", qwen3, "-o", made, "--text", text, "--tokens", 512, "--context", 64),
        *("--no-gradient",),
    )
    assert done.code == 0, done.err
    done = cli(
        *("plan", made, "--method", "own", "--allocation", "odd", "--sparsity", 0.25, "-o"),
        planned,
    )
    assert done.code == 0, done.err
    plan = Plan.load(planned)
    assert {(x.block, round(x.sparsity, 3)) for x in plan.document.linears.values()} == {
        (0, 0.0),
        (1, 0.5),
    }
    vector = plan.vectors["model.layers.1.mlp.up_proj"]
    assert vector[0] / vector[-1] == pytest.approx(1000, rel=1e-3)


@pytest.mark.usefixtures("_outsider")
def test_an_entry_point_is_all_a_package_needs(
    calibration: Made, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_package.py").write_text(
        "import torch\n"
        "def half(statistics, criterion, target):\n"
        "    return torch.full((len(statistics),), target / 2, dtype=torch.float64)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def entry_points(group: str) -> list[EntryPoint]:
        found = EntryPoint("half", "outside_package:half", group)
        return [found] if group == "wina.allocations" else []

    monkeypatch.setattr("wina.registry.entry_points", entry_points)
    monkeypatch.setattr(allocations, "_plugins_loaded", False)
    arguments = ("plan", calibration[0], "--allocation", "half", "--sparsity", 0.5)
    done = cli(*arguments, "-o", tmp_path / "p", "--json")
    assert done.code == 0, done.err
    assert one_object(done.out)["expected_sparsity"] == pytest.approx(0.25, abs=1e-4)


def test_an_infinite_perplexity_is_still_json(
    qwen3: Path, plan: Path, text: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wina.measures.math.exp", lambda _value: math.inf)
    done = cli("eval", qwen3, "--plan", plan, "--text", text, "--tokens", 100, "--json")
    assert done.code == 0
    assert one_object(done.out)["dense"]["perplexity"] is None


@pytest.mark.parametrize("command", ["run", "chat", "calibrate", "plan", "eval", "inspect"])
def test_help_shows_the_options(command: str, cli: Cli) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert "Usage" in done.out


def test_no_command_is_help(cli: Cli) -> None:
    done = cli()
    assert done.code == 2
    assert "calibrate" in done.out + done.err
