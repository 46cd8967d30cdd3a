"""What the documentation shows exists: commands, options, files and Python that compiles."""

import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from wina.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@cache
def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and body of each fenced block, its commands on one line each."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.M | re.S)
    return [
        (str(page.relative_to(ROOT)), body.replace("\\\n", " "))
        for page in PAGES
        for body in pattern.findall(page.read_text(encoding="utf-8"))
    ]


def lines(program: str) -> list[tuple[str, str]]:
    """Page and command line of each call of ``program`` in a bash block."""
    found = [(page, line.strip()) for page, body in blocks("bash") for line in body.splitlines()]
    return [(page, line) for page, line in found if line.startswith(f"{program} ")]


@pytest.mark.parametrize(("page", "line"), lines("wina"))
def test_commands_parse(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in COMMANDS, f"{page}: {line}"
    try:
        # Parses arguments, options and the types of their values; runs nothing.
        COMMANDS[name].make_context(name, arguments)
    except click.UsageError as error:
        pytest.fail(f"{page}: {line}: {error.format_message()}")


def test_commands_are_shown() -> None:
    shown = {shlex.split(line)[1] for _, line in lines("wina")}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_named_in_prose_exist(page: Path) -> None:
    vllm = {"--enable-dbo", "--nnodes", "--no-enable-prefix-caching", "--additional-config"}
    known = (
        {"--no-deps"}
        | vllm
        | {
            option
            for command in COMMANDS.values()
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
    )
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if match := re.match(r"wina ([a-z]+)\b", code):
            assert match[1] in COMMANDS, f"{page.name}: {code}"
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
            named = option in known or any(
                option.removeprefix("--").replace("-", "_") in script for script in scripts
            )
            assert named, f"{page.name}: {code}"


@pytest.mark.parametrize(("page", "body"), blocks("python"))
def test_python_compiles(page: str, body: str) -> None:
    compile(body, page, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_prose_exist(page: Path) -> None:
    for name in re.findall(r"`((?:wina|tests|benchmarks|docs)/[\w/.]+)`", prose(page)):
        found = (ROOT / name).exists() or (ROOT / "src" / name).exists()
        assert found, f"{page.name}: {name}"


def test_scripts_and_their_options_exist() -> None:
    for page, line in lines("python"):
        script = shlex.split(line, comments=True)[1]
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"--([a-z-]+)", line):
            named = option.replace("-", "_") in source or f'"--{option}"' in source
            assert named, f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), lines("make"))
def test_make_targets_exist(page: str, line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in shlex.split(line, comments=True)[1:]:
        assert re.search(rf"^{target}:", makefile, re.M), f"{page}: {line}"
