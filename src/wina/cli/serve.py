"""`wina serve`."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from wina.cli import options
from wina.integrations.vllm import serve as vllm
from wina.progress import note

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder, small GGUF file, or demo.")],
    plan: options.PlanSource = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print the command instead of running it.")
    ] = False,
) -> None:
    """Serve a sparse model with vLLM's OpenAI server; what else is given goes to vLLM.

    Without --plan the model is a saved sparse one's folder.

    Examples:
        wina serve HuggingFaceTB/SmolLM2-360M-Instruct --plan plan --port 8000

        wina serve saved-sparse-model --tensor-parallel-size 2

        wina serve demo --plan plan --print
    """
    command = vllm.command(model, plan, context.args)
    besides = vllm.preloads(os.environ.get("LD_PRELOAD", ""))
    whole = shlex.join([*(f"{name}={value}" for name, value in besides.items()), *command])
    if show:
        typer.echo(whole)
        return
    vllm.check_installed()
    note(whole)
    os.execve(command[0], command, {**os.environ, **besides})
