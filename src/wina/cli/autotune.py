"""`wina autotune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from wina.bench import CONFIGS
from wina.cli import options
from wina.errors import UsageError, WinaError
from wina.kernels.backends import unavailable
from wina.kernels.cuda import tune
from wina.kernels.cuda.rows import TOKENS
from wina.kernels.measured import device_kind, fields_of
from wina.kernels.shapes import sizes_of, step_shapes
from wina.kernels.triton import TILES
from wina.models.loading import DTYPES, load_config


def autotune(
    model: options.Model = None,
    config: Annotated[
        str | None, typer.Option(help="A known shape instead of a model: llama-3.2-1b, ...")
    ] = None,
    tokens: Annotated[
        str,
        typer.Option(
            help=f"Rows decoded together: of {', '.join(map(str, TOKENS))} for the kernel that "
            f"skips weights, of {', '.join(map(str, TILES))} for the product that masks its input."
        ),
    ] = "1",
    dtype: Annotated[
        str, typer.Option(help="Of the weights; float16 and bfloat16 share what is found.")
    ] = "bfloat16",
    again: Annotated[bool, typer.Option("--again", help="Also what is known already.")] = False,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Measure which configurations of the GPU kernels serve a model's shapes best on this GPU.

    What is found is kept in the cache folder and used from then on; shapes that nobody measured
    are served by a rule. Only the config is read, no weights. Nothing else should run on the GPU.
    An interrupted run goes on where it was.

    Examples:
        wina autotune HuggingFaceTB/SmolLM2-360M-Instruct

        wina autotune --config qwen2.5-7b --tokens 1,2,4 --json

        wina autotune --config llama-3-8b --tokens 16,32,64
    """
    if model is not None and config is not None:
        raise UsageError("give a model or --config, not both")
    if dtype not in DTYPES:
        raise UsageError(f"unsupported dtype {dtype!r}; known: {', '.join(DTYPES)}")
    rows = options.numbers(tokens, "--tokens", int)
    if unknown := [number for number in rows if number not in (*TOKENS, *TILES)]:
        raise UsageError(f"--tokens must be of {(*TOKENS, *TILES)}; got {unknown}")
    many = [number for number in rows if number in TILES]
    if many and dtype == "float32":
        raise UsageError(f"--tokens {many[0]} is of float16 and bfloat16 alone")
    known = CONFIGS.get(config) if config is not None else load_config(model, revision)
    shapes = step_shapes(*sizes_of(known))
    if reason := unavailable("cuda"):
        raise WinaError(f"autotune measures the CUDA kernels, which cannot run here: {reason}")
    few = [number for number in rows if number in TOKENS]
    found: dict[str, Any] = {}
    found |= tune.extend(shapes, few, DTYPES[dtype], again=again)
    if many:
        from wina.kernels.triton import tune as products

        found |= products.extend(shapes, many, DTYPES[dtype], again=again)
    kind = device_kind(0)
    entries = {key: fields_of(one) for key, one in found.items()}
    if as_json:
        options.print_json({"device": kind, "dtype": dtype, "configurations": entries})
        return
    table = Table("launch", "configuration", title=kind)
    for key, fields in entries.items():
        chosen = ", ".join(f"{name} {value}" for name, value in (fields or {}).items())
        table.add_row(key, chosen or "not used")
    Console().print(table)
