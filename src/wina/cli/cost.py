"""`wina cost`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from wina.cli import options
from wina.cost import Part, TokenCost, token_cost
from wina.errors import UsageError
from wina.methods import methods
from wina.models.loading import load_config

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


def cost(
    model: options.Model = None,
    sparsity: options.Sparsity = 0.5,
    preset: options.Preset = "wina",
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(BYTES)}.")] = "bfloat16",
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Count a decoded token's multiply-adds and bytes of weights, from the config alone.

    The model may also be a config.json. "paper" counts as the papers do, blocks x (1 - s) + head;
    "true" adds the gates and, where the preset has them, the rotations.

    Examples:
        wina cost demo --sparsity 0.5

        wina cost meta-llama/Meta-Llama-3-8B --sparsity 0.5 --preset wina-paper
    """
    method = methods.get(preset)
    if method.adds:
        raise UsageError(
            f"a config does not tell the cost of {preset!r}: it adds {method.adds}. "
            "wina reproduce measures the bytes of its plans."
        )
    if dtype not in BYTES:
        raise UsageError(f"unsupported dtype {dtype!r}; known: {', '.join(BYTES)}")
    config = load_config(model, revision)
    found = token_cost(config, sparsity, basis=method.basis, bytes_per_weight=BYTES[dtype])
    if as_json:
        options.print_json({"preset": preset, "dtype": dtype, **found.record()})
    else:
        _show(found, preset, dtype)


def _show(found: TokenCost, preset: str, dtype: str) -> None:
    table = Table("", "10^9 multiply-adds", "MB of weights", "saved")

    def row(name: str, part: Part, saved: str = "") -> None:
        table.add_row(name, f"{part.multiply_adds / 1e9:.4g}", f"{part.bytes / 1e6:.4g}", saved)

    row("blocks, dense", found.blocks)
    row("head", found.head)
    row("gates", found.gating)
    if found.rotation.bytes:
        row("rotations", found.rotation)
    if found.free.bytes:
        row("(zero columns, free with top-k)", found.free)
    table.add_section()
    row("dense", found.dense)
    row("paper: blocks x (1 - s) + head", found.paper, f"{found.saved(found.paper):.1%}")
    row("true", found.true, f"{found.saved(found.true):.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"[dim]{preset} at {found.sparsity:.0%}, {dtype}; without embeddings, norms, biases and "
        "attention over the cache[/dim]",
        highlight=False,
    )
