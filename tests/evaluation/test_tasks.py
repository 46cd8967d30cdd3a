"""Tasks of lm-evaluation-harness on tiny models: scores, pairing, failures, going on."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests.helpers import Cli, english, make_plan, make_tokenizer
from wina.errors import UsageError
from wina.layers import sparse_layers
from wina.plan import Plan

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")

from wina.evaluation import tasks as module
from wina.evaluation.tasks import (
    TasksEvaluation,
    check_tasks,
    evaluate_tasks,
    fill_differences,
    paired_difference,
)

GENERATE = """
task: repeat
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{goal}}}}"
doc_to_target: "{{{{sol1}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{goal}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
BROKEN = GENERATE.replace("task: repeat", "task: broken").replace("{file}", "no-such-file.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in the published form of PIQA, and three of the harness's configurations."""
    folder = tmp_path_factory.mktemp("data")
    words = english(4_000).split()
    rows = [
        {
            "goal": " ".join(words[i : i + 5]),
            "sol1": words[i + 5],
            "sol2": " ".join(words[i + 6 :][:2]),
        }
        for i in range(0, 80, 4)
    ]
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "valid-labels.lst").write_text("\n".join(str(i % 2) for i in range(len(rows))))
    for name, text in (("repeat", GENERATE), ("rolling", ROLLING), ("broken", BROKEN)):
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "valid.jsonl"))
    return folder


def run(
    model: PreTrainedModel, plans: list[Plan], data: Path, *names: str, **options: Any
) -> TasksEvaluation:
    tokenizer = make_tokenizer()
    tasks = check_tasks(names, data)
    return evaluate_tasks(model, tokenizer, plans, tasks, name="tiny", **options)


def test_piqa_is_what_the_model_finds_likelier(model: PreTrainedModel, data: Path) -> None:
    """The harness's figure, recomputed from logits without it."""
    tokenizer = make_tokenizer()
    plan = make_plan(model, 0.4)
    found = run(model, [plan], data, "piqa")

    def likelihood(context: str, following: str) -> float:
        head = tokenizer.encode(context)
        ids = tokenizer.encode(context + following)
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        logits = logits.detach()
        return sum(float(logits[i - 1, ids[i]]) for i in range(len(head), len(ids)))

    rows = [json.loads(line) for line in (data / "valid.jsonl").read_text().splitlines()]
    right = []
    for i, row in enumerate(rows):
        context = f"Question: {row['goal']}\nAnswer:"
        scores = [likelihood(context, " " + row[key]) for key in ("sol1", "sol2")]
        right.append(float(scores[1] > scores[0]) == i % 2)
    score = found.dense.tasks["piqa"]
    assert score.metrics["acc,none"].questions == [float(x) for x in right]
    assert score.metrics["acc,none"].value == pytest.approx(statistics.mean(right))
    assert score.count == len(rows)
    assert "valid.jsonl" in score.data
    assert found.dense.sparsity is None


def test_all_positions_of_log_likelihoods_are_sparse(model: PreTrainedModel, data: Path) -> None:
    everything = make_plan(model, 1e9)
    found = run(model, [everything], data, "piqa").results[0]
    assert found.sparsity == 1.0
    nothing = run(model, [make_plan(model, 0.0)], data, "piqa").results[0]
    assert nothing.sparsity == 0.0
    assert nothing.tasks["piqa"].metrics["acc,none"].difference == 0.0
    assert nothing.tasks["piqa"].metrics["acc,none"].changed == 0.0
    assert not list(sparse_layers(model))


def test_batches_change_nothing(model: PreTrainedModel, data: Path) -> None:
    plan = make_plan(model, 0.4)
    one = run(model, [plan], data, "piqa", batch_size=1)
    many = run(model, [plan], data, "piqa", batch_size=16)
    assert one.results[0].tasks == many.results[0].tasks
    assert one.results[0].sparsity == pytest.approx(many.results[0].sparsity)


def test_generation_has_a_dense_prompt_and_sparse_tokens(
    model: PreTrainedModel, data: Path
) -> None:
    found = run(model, [make_plan(model, 1e9)], data, "repeat", "rolling", limit=4)
    assert found.results[0].sparsity == 1.0  # of the positions that were sparse at all
    assert set(found.dense.tasks) == {"repeat", "rolling"}
    assert found.dense.tasks["repeat"].count == 4
    byte = found.dense.tasks["rolling"].metrics["byte_perplexity,none"]
    assert byte.value > 1
    assert byte.questions is None
    assert not byte.higher_is_better


def test_a_failing_task_leaves_the_others(model: PreTrainedModel, data: Path) -> None:
    found = run(model, [make_plan(model, 0.4)], data, "broken", "piqa", limit=4)
    for one in (found.dense, *found.results):
        assert set(one.tasks) == {"piqa"}
        assert set(one.failures) == {"broken"}
    assert "no-such-file" in found.failures["broken"] or "FileNotFound" in found.failures["broken"]


def test_a_task_that_fails_while_it_runs_leaves_the_others(
    model: PreTrainedModel, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wina.integrations.lm_eval import WinaLM

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("the generator is gone")

    monkeypatch.setattr(WinaLM, "_model_generate", fail)
    found = run(model, [make_plan(model, 0.4)], data, "repeat", "piqa", limit=4)
    assert found.failures == {"repeat": "RuntimeError: the generator is gone"}
    assert set(found.results[0].tasks) == {"piqa"}
    assert not list(sparse_layers(model))


def test_an_interrupted_evaluation_goes_on(
    model: PreTrainedModel, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from wina.integrations import lm_eval as integration

    plan = make_plan(model, 0.3)
    monkeypatch.setattr(integration, "PIECE", 4)
    monkeypatch.setenv("WINA_CACHE", str(tmp_path / "whole"))
    whole = run(model, [plan], data, "piqa", "repeat")
    monkeypatch.setenv("WINA_CACHE", str(tmp_path / "cut"))
    calls = 0
    original = integration.WinaLM._model_call

    def counting(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(integration.WinaLM, "_model_call", counting)
    limit = 50  # past the dense model's 40
    with pytest.raises(KeyboardInterrupt):
        run(model, [plan], data, "piqa", "repeat")
    assert not list(sparse_layers(model))
    (path, *_), *_ = [
        sorted((tmp_path / "cut" / "answers").iterdir(), key=lambda x: x.stat().st_size)
    ]
    with path.open("a") as file:
        file.write('{"answers": {"torn')  # as a kill in the middle of a write leaves it
    before, limit = calls, 0
    again = run(model, [plan], data, "piqa", "repeat")
    assert again == whole
    assert calls - before < 40  # the dense model's answers were there
    done = calls
    assert run(model, [plan], data, "piqa", "repeat") == whole
    assert calls == done


def test_other_plans_have_other_answers(model: PreTrainedModel, data: Path) -> None:
    found = run(model, [make_plan(model, t) for t in (0.2, 0.6)], data, "piqa")
    assert found.results[0].sparsity < found.results[1].sparsity


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=50))
def test_paired_difference(pairs: list[tuple[float, float]]) -> None:
    ours, dense = zip(*pairs, strict=True)
    mean, error = paired_difference(ours, dense)
    differences = [x - y for x, y in pairs]
    assert mean == pytest.approx(statistics.fmean(differences), abs=1e-12)
    assert error == pytest.approx(
        statistics.stdev(differences) / math.sqrt(len(pairs)), rel=1e-6, abs=1e-9
    )


def test_pairs_need_the_same_questions(model: PreTrainedModel, data: Path) -> None:
    found = run(model, [make_plan(model, 0.4)], data, "piqa", limit=6)
    score, dense = found.results[0].tasks["piqa"], found.dense.tasks["piqa"]
    pair = paired_difference(
        score.metrics["acc,none"].questions or [], dense.metrics["acc,none"].questions or []
    )
    assert (
        score.metrics["acc,none"].difference,
        score.metrics["acc,none"].difference_stderr,
    ) == pair
    other = score.model_copy(deep=True, update={"asked": "other questions"})
    other.metrics["acc,none"].difference = None
    fill_differences(other, dense)
    assert other.metrics["acc,none"].difference is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["piqua"], "unknown task 'piqua'. Did you mean 'piqa'?"),
        (["piqa", "piqa"], "named twice"),
        ([""], "at least one"),
    ],
)
def test_bad_names(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        check_tasks(names)


def test_bad_data(data: Path, tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="no folder"):
        check_tasks(["piqa"], tmp_path / "nowhere")
    (tmp_path / "valid.jsonl").write_text((data / "valid.jsonl").read_text())
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    found = run(model, [], tmp_path, "piqa")
    assert "20 questions, 2 labels" in found.failures["piqa"]


def test_the_command(qwen3: Path, data: Path, tmp_path: Path, cli: Cli, calibration: Any) -> None:
    plan = calibration[1].plan(0.5).save(tmp_path / "plan")
    arguments = ("eval", qwen3, "--plan", plan, "--task-data", data, "--limit", 6)
    done = cli(*arguments, "--tasks", "piqa", "--json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert set(content) == {"tasks"}
    assert content["tasks"]["results"][0]["tasks"]["piqa"]["count"] == 6
    done = cli(*arguments, "--tasks", "piqa,broken")
    assert done.code == 1
    assert "1 of the tasks failed: broken" in done.said
    assert "acc_norm" in done.out
    assert module.LOCAL.keys() == {"piqa"}
