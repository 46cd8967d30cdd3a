from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.conformance import go_through
from tests.families import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_family(case: Case, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path) -> None:
    outcome = go_through(case, tokenizer, text, tmp_path)
    assert bool(outcome.refusal) == bool(case.refused), outcome.refusal
    if case.refused:
        assert case.refused in outcome.refusal


def test_the_table_in_the_docs_lists_these_cases() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if " | `" in line]
    assert [(row[0][2:], row[1].strip("`")) for row in rows] == [
        (case.name, case.model_type) for case in CASES
    ], "run benchmarks/support_table.py"
    refused = {row[0][2:] for row in rows if row[-1].startswith("refused")}
    assert refused == {case.name for case in CASES if case.refused}
