"""The command line: each command is thin over the Python interface.

Exit codes: 0 done, 1 failed, 2 wrong usage. With --json, standard output holds one JSON object
and nothing else; progress and notes go to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

from wina.cli import (
    autotune,
    bench,
    calibrate,
    chat,
    compare,
    cost,
    evaluate,
    inspect,
    plan,
    report,
    reproduce,
    run,
    serve,
    tune,
)
from wina.errors import UsageError, WinaError
from wina.progress import note

INTERRUPTED = 130  # 128 and the number of SIGINT

app = typer.Typer(
    name="wina",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"wina {version('wina')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Training-free activation sparsity: faster decoding, and the loss measured."""


app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("calibrate")(calibrate.calibrate)
app.command("plan")(plan.plan)
app.command("tune")(tune.tune)
app.command("eval")(evaluate.evaluate)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("bench")(bench.bench_command)
app.command("autotune")(autotune.autotune)
app.command("inspect")(inspect.inspect)
app.command("cost")(cost.cost)
app.command("reproduce")(reproduce.reproduce)
app.command("serve", context_settings=serve.SETTINGS)(serve.serve)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        app(arguments)
    except (WinaError, OSError) as error:
        note(f"error: {error}", style="red")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except SystemExit as ending:  # typer's, after a command has ended in any other way
        if ending.code == INTERRUPTED:
            note("interrupted; long work goes on where it was when started again")
        raise
