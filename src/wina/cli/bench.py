"""`wina bench`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from wina.bench import BASELINES, CONFIGS, BenchReport, BenchSettings, bench, random_model
from wina.bench.configs import random_calibration
from wina.cache import cached_plan
from wina.calibration import make_plan
from wina.cli import options
from wina.errors import UsageError
from wina.models import identify
from wina.models.loading import DTYPES, resolve_device
from wina.models.quantize import check_quantize
from wina.models.quantize import quantize as quantize_model
from wina.plan import Plan
from wina.progress import note


def bench_command(
    model: options.Model = None,
    config: Annotated[
        str | None,
        typer.Option(help="Random weights of a known shape instead of a model: llama-3.2-1b, ..."),
    ] = None,
    sparsities: Annotated[str, typer.Option(help="Targets.")] = "0,0.25,0.5,0.65",
    method: options.Method = "wina",
    allocation: options.Allocation = None,
    include_head: options.IncludeHead = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    context: Annotated[int, typer.Option(help="Positions before the first timed token.")] = 512,
    batch: Annotated[int, typer.Option(help="Texts decoded together.")] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each; medians are over them.")] = 9,
    tokens: Annotated[int, typer.Option(help="Tokens a turn.")] = 16,
    baselines: Annotated[
        str, typer.Option(help="Dense ways to time: all, or names by comma.")
    ] = "all",
    compare_tokens: Annotated[
        int, typer.Option(help="Greedy tokens to compare with the reference kernels' text.")
    ] = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = "bfloat16",
    quantize: options.Quantize = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Time whole-model decoding, dense and sparse, beside the bandwidth that the bytes need.

    Everything is timed in turns in one run. The baselines are dense: Transformers' generate
    eager and compiled, wina's own loop compiled, that loop with oneDNN's prepacked weights, and
    llama.cpp (extra bench) on the same weights; the speedup is over the fastest of them at the
    same precision.

    Examples:
        wina bench --device cpu --threads 1 --sparsities 0.5,0.65

        wina bench --config llama-3.2-1b --device cpu --threads 2 --json

        wina bench --quantize int4 --device cpu --threads 2

        wina bench --config llama-3-8b --device cuda --context 8192
    """
    names = BASELINES if baselines == "all" else tuple(filter(None, baselines.split(",")))
    settings = BenchSettings(
        sparsities=tuple(options.numbers(sparsities, "--sparsities", float)),
        context=context,
        batch=batch,
        rounds=rounds,
        tokens=tokens,
        baselines=names,
        compare_tokens=compare_tokens,
    )
    method = method or "wina"
    for sparsity in settings.sparsities:
        options.check_request(sparsity, method, allocation, "threshold")
    if model is not None and config is not None:
        raise UsageError("give a model or --config, not both")
    if config is not None:
        CONFIGS.get(config)
        if dtype not in DTYPES:
            raise UsageError(f"unsupported dtype {dtype!r}; known: {', '.join(DTYPES)}")
    place = resolve_device(device)
    if threads < 0:
        raise UsageError(f"threads must not be negative; got {threads}")
    if threads:
        torch.set_num_threads(threads)
    report = (
        _bench_config(
            config, settings, method, allocation, include_head, (dtype, quantize), place, seed
        )
        if config is not None
        else _bench_model(
            model,
            settings,
            method,
            allocation,
            include_head,
            (dtype, device, revision, trust_remote_code, quantize),
            seed,
        )
    )
    if as_json:
        options.print_json(report.model_dump())
    else:
        _show(report)


def _bench_config(
    config: str,
    settings: BenchSettings,
    method: str,
    allocation: str | None,
    include_head: bool,
    weights: tuple[str, str | None],
    device: torch.device,
    seed: int,
) -> BenchReport:
    note(f"random weights of {config}")
    dtype, quantize = weights
    scheme = check_quantize(quantize)
    model = random_model(config, DTYPES[dtype], device, seed)
    if scheme is not None:
        quantize_model(model, scheme)
        config = f"{config}, {scheme}"
    calibration = random_calibration(model, config, seed)

    def plan_for(sparsity: float) -> Plan:
        chosen = allocation or "uniform"
        return make_plan(
            calibration,
            sparsity,
            method,
            chosen,
            include_head=include_head,
            model=model,
            refine=True,
        )

    return bench(model, plan_for, settings, name=config, method=method, include_head=include_head)


def _bench_model(
    model: str | None,
    settings: BenchSettings,
    method: str,
    allocation: str | None,
    include_head: bool,
    source: tuple[str, str, str | None, bool, str | None],
    seed: int,
) -> BenchReport:
    loaded = options.load(model, *source)

    def plan_for(sparsity: float) -> Plan:
        return cached_plan(
            loaded,
            options.quick_settings(loaded, seed),
            sparsity,
            method,
            allocation,
            "threshold",
            include_head,
        )

    identify(loaded.model, loaded.name)
    return bench(
        loaded.model,
        plan_for,
        settings,
        name=loaded.name,
        method=method,
        include_head=include_head,
    )


def _show(report: BenchReport) -> None:
    head = "head included" if report.include_head else "head dense"
    table = Table(
        "",
        "tokens/s",
        "ms",
        "speedup",
        "GB/s",
        "realized",
        "of bytes",
        "text",
        title=f"{report.model}, {report.dtype}, {head}, context {report.context}, "
        f"batch {report.batch}, {report.device}, {report.threads} threads",
        caption=f"read bandwidth {report.read_bandwidth_gbps:.1f} GB/s; speedup over the fastest "
        "dense baseline of the same precision; 'of bytes': speedup / what the bytes allow; "
        "'text': greedy text equals the reference kernels'",
    )
    best = max((x.tokens_per_second or 0 for x in report.baselines if x.same_precision), default=0)
    for baseline in report.baselines:
        if baseline.tokens_per_second is None:
            table.add_row(baseline.name, "-", "", baseline.note)
            continue
        speed = baseline.tokens_per_second
        table.add_row(
            baseline.name,
            f"{speed:.1f}",
            f"{baseline.milliseconds:.2f}",
            f"{speed / best:.2f}" if best else "",
            f"{report.dense_bytes * speed / report.batch / 1e9:.1f}"
            if baseline.same_precision
            else "",
        )
    for result in report.results:
        text = {None: "", True: "same", False: "differs"}[result.same_text]
        table.add_row(
            f"wina {result.sparsity:.0%}",
            f"{result.tokens_per_second:.1f}",
            f"{result.milliseconds:.2f}",
            f"{result.speedup:.2f}",
            f"{result.touched_gbps:.1f}",
            f"{result.realized_sparsity:.1%}",
            f"{result.byte_efficiency:.2f}",
            text,
        )
    console = Console()
    console.print(table)
    for result in report.results:
        if result.same_text is False:
            console.print(f"{result.sparsity:.0%}: {result.text_note}", highlight=False)
    prefill = ", ".join(f"{name} {ms:.0f} ms" for name, ms in report.prefill_ms.items())
    console.print(f"prefill of {report.prefill_tokens} tokens: {prefill}", highlight=False)
