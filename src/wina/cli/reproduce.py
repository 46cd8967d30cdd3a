"""`wina reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wina.cli import options
from wina.errors import UsageError
from wina.methods import methods
from wina.progress import note
from wina.reproduce import GridSettings, write_report
from wina.reproduce import reproduce as run_grid
from wina.reproduce.plots import check_plots
from wina.reproduce.report import REFERENCES


def reproduce(
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text file to score; may be repeated.")
    ] = None,
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = "demo",
    names: Annotated[
        str, typer.Option("--methods", help="Methods, separated by commas; all if omitted.")
    ] = "",
    sparsities: Annotated[str, typer.Option(help="Separated by commas.")] = "0.25,0.4,0.5,0.65",
    calibration_text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file; omitted: as of wina calibrate."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the grid.")] = Path(
        "grid"
    ),
    reference: Annotated[
        str, typer.Option(help="Methods that others are paired with, separated by commas.")
    ] = ",".join(REFERENCES),
    tokens: Annotated[int, typer.Option(help="How many to score at most.")] = 20_480,
    calibration_tokens: Annotated[int, typer.Option(help="Of calibration text.")] = 16_384,
    search_tokens: Annotated[int, typer.Option(help="That a greedy search reads.")] = 2_048,
    context: Annotated[int, typer.Option(help="Positions of a window.")] = 2_048,
    dense_prefix: options.DensePrefix = 20,
    plots: Annotated[bool, typer.Option(help="Draw plots; needs the extra report.")] = True,
    fill: Annotated[
        bool, typer.Option(help="Fill the grid; or report on the cells that are there.")
    ] = True,
    processes: Annotated[
        int, typer.Option(help="That fill it side by side, each with a model of its own.")
    ] = 1,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    seeds: Annotated[
        str, typer.Option(help="Of searches and of what is random, separated by commas.")
    ] = "0",
    as_json: options.Json = False,
) -> None:
    """Compare methods: models x methods x sparsities on one text, with tables and plots.

    Started again with the same settings, it goes on where it was; methods, models and sparsities
    may be added.

    Examples:
        wina reproduce --text test.txt --calibration-text valid.txt -o grid

        wina reproduce --text test.txt --methods teal,wina-paper --sparsities 0.5 --seeds 0,1,2
    """
    if not text:
        raise UsageError("name a text to score: --text FILE")
    if plots:
        check_plots()
    targets = options.numbers(sparsities, "--sparsities", float)
    chosen = options.numbers(seeds, "--seeds", int)
    settings = GridSettings(
        text=tuple(text),
        calibration_text=tuple(calibration_text or ()),
        tokens=tokens,
        calibration_tokens=calibration_tokens,
        search_tokens=search_tokens,
        context=context,
        dense_prefix=dense_prefix,
        dtype=dtype,
    )
    wanted = names.split(",") if names else list(methods)
    references = [methods.get(name).name for name in reference.split(",")]
    cells = run_grid(
        *(output, models.split(","), wanted, targets, settings, device, chosen, fill, processes)
    )
    paths = write_report(output, cells, references, plots=plots)
    if as_json:
        options.print_json({"cells": [cell.model_dump(mode="json") for cell in cells]})
        return
    for path in paths:
        note(str(path), style="none")
