"""Run the conformance cases and write their table into docs/architectures.md.

python benchmarks/support_table.py          # rewrite the table
python benchmarks/support_table.py --check  # exit 1 if the page would change
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tests.conformance import Outcome, go_through  # noqa: E402
from tests.families import CASES  # noqa: E402
from tests.helpers import english, make_tokenizer  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
START, END = "<!-- table: start -->\n", "<!-- table: end -->\n"


def row(outcome: Outcome) -> str:
    """Return one line of the table."""
    case = outcome.case
    result = f"refused: {outcome.refusal}" if outcome.refusal else "works"
    kinds, groups = ", ".join(outcome.kinds), ", ".join(outcome.groups)
    head = f"| {case.name} | `{case.model_type}` | {case.notable} |"
    return f"{head} {kinds} | {groups} | {result} |"


def table() -> str:
    """Run every case and return the table."""
    head = "| models | model_type | notable | planned kinds | input basis from | result |"
    lines = [head, "| --- " * 6 + "|"]
    tokenizer = make_tokenizer()
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.txt"
            text.write_text(english(12_000), encoding="utf-8")
            lines.append(row(go_through(case, tokenizer, text, Path(folder))))
            print(lines[-1])
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or check it."""
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(START)
    new = head + START + table() + END + rest.partition(END)[2]
    if "--check" in sys.argv:
        sys.exit(int(new != page))
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
