"""What the documentation shows exists: commands, options, files and Python that compiles."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from wina.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for body in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            found.append((page.name, body))
    return found


def command_lines() -> list[tuple[str, str]]:
    lines = [(page, line) for page, body in blocks("bash") for line in body.splitlines()]
    return [(page, line) for page, line in lines if line.startswith("wina ")]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_and_their_options_exist(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in COMMANDS, f"{page}: {line}"
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    used = {part.partition("=")[0] for part in arguments if re.match(r"--?[a-z]", part)}
    assert used <= known, f"{page}: {line}"


@pytest.mark.parametrize(("page", "body"), blocks("python"))
def test_python_compiles(page: str, body: str) -> None:
    compile(body, page, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_scripts_named_in_the_docs_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"python (benchmarks/\w+\.py)", page.read_text()):
            assert (ROOT / script).exists(), f"{page.name}: {script}"
