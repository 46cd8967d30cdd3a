"""Quantized and sparse: perplexity beside the bytes that a token really reads, on one model.

    python benchmarks/quantized_table.py quantized --model demo --text wikitext2-test.txt \
        --calibration-text wikitext2-valid.txt --device cuda

Each weight format is scored dense and at several sparsities, with a calibration of the quantized
model itself, and beside it dense formats of fewer bits: at equal bytes, which loses less?

The weights are those that the kernels of ``--quantize`` compute with, integers times scales, held
in float32 (``tests/models/test_quantized_table.py`` compares them with torchao's bit by bit; it is
not needed here). Activations are float32 in every row. Each row is kept in the folder as it comes;
started again, the table goes on where it was. A folder takes one model.

Formats: bf16 (with --gguf also, of the same values, the bytes of a Q4_1 file's own codes); int8;
int4-g32, int3-g64, ... (scale and zero point for each group of inputs, to nearest); the same with
-gptq (arXiv 2210.17323, from the calibration text, with a search for each group's range); q2_k and
q3_k, which need llama.cpp's library: --ggml libggml-base.so.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from wina.calibration import Calibration, CalibrationSettings, FileText, calibrate, make_plan
from wina.cost import extra_bytes
from wina.errors import UsageError
from wina.evaluation import text_windows
from wina.layers import scoring
from wina.layers.linear import sparse_layers
from wina.measures import Totals, compare, score_plan
from wina.models import LoadedModel, Site, find_sites, load_model
from wina.plan import Plan
from wina.plan.plan import DOCUMENT
from wina.progress import note
from wina.tuning import TuningSettings, tuned_plan

LOSS = "loss"
DENSE = "dense"
GGML = {"q2_k": 10, "q3_k": 11}  # numbers of the types, and bits a weight
GGML_BITS = {"q2_k": 2.625, "q3_k": 3.4375}
SUPERBLOCK = 256
BLOCK = 64  # bytes of a row of codes that are read together
SHRINKS = [1 - 0.04 * step for step in range(13)]  # of a group's range, tried for -gptq
DAMPING = 0.01
COUNTED_WINDOWS = 2  # on which groups without a live channel are counted


@dataclass(frozen=True)
class Format:
    """How the blocks' weights are stored; the head of all but bf16 and gguf is int8.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; 0: all of a row, None: no scales.
        gptq: codes from GPTQ and not to the nearest.
    """

    name: str
    bits: float
    group: int | None = None
    gptq: bool = False

    @classmethod
    def parse(cls, name: str) -> Format:
        """Return the format of a name such as int3-g64-gptq."""
        if name == "bf16":
            return cls(name, 16)
        if name == "gguf":  # Q4_1
            return cls(name, 4, 32)
        if name in GGML:
            return cls(name, GGML_BITS[name])
        found = re.fullmatch(r"int([2348])(?:-g(\d+))?(-gptq)?", name)
        if found is None or (found[1] != "8") != (found[2] is not None):
            raise UsageError(f"unknown format {name!r}: {__doc__}")
        return cls(name, int(found[1]), int(found[2] or 0), bool(found[3]))

    def scale_bytes(self) -> float:
        """Return the bytes of one group's scale and zero point."""
        if self.group is None:
            return 0.0
        if self.group == 0:  # torchao's int8: float32, no zero point
            return 4.0
        if self.name == "gguf":
            return 4.0  # scale and minimum, 16 bits each
        # Fewer than four bits: zero points packed as the codes are.
        return 2.0 + (1.0 if self.bits == 4 else self.bits / 8)

    def block_bytes(
        self, sites: Sequence[Site], kept: dict[str, float], live: dict[str, float]
    ) -> float:
        """Return the bytes of the blocks' linears that a token reads.

        Rows of a sparse model's codes are whole blocks of 64 bytes, as in wina's layout.

        Args:
            sites: the linears.
            kept: share of live channels of each; empty for the dense model.
            live: share of groups with a live channel.
        """
        total = 0.0
        for site in sites:
            row = site.out_features * self.bits / 8
            if kept and self.group is not None:
                row = math.ceil(row / BLOCK) * BLOCK
            total += site.in_features * row * kept.get(site.name, 1.0)
            if self.group is not None:
                groups = 1 if self.group == 0 else site.in_features // self.group
                share = live.get(site.name, 1.0)
                total += site.out_features * groups * self.scale_bytes() * share
        return total

    def head_bytes(self, head: nn.Module) -> float:
        """Return the bytes of the output head, which stays dense."""
        rows, width = head.weight.shape
        if self.name == "bf16":
            return rows * width * 2.0
        if self.name == "gguf":  # Q8_0
            return rows * width * 8.5 / 8
        return rows * width + rows * 4.0


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and float32 scales, (out, 1), as torchao's int8 weights of a row have them."""
    largest = weight.abs().amax(1, keepdim=True)
    scales = (largest / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
    codes = (weight * (1.0 / scales)).round().clamp(-128, 127)
    return codes, scales


def affine_codes(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points, (out, groups, ...), as torchao's weight-only ones.

    All arithmetic is in the weight's dtype, as there.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    x = weight.reshape(weight.shape[0], -1, group)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    least, most = torch.minimum(x.amin(-1), zero), torch.maximum(x.amax(-1), zero)
    scales = ((most - least) / float(high - low)).clamp(min=torch.finfo(x.dtype).smallest_normal)
    zeros = (low - (least / scales).round()).clamp(low, high).to(torch.int8)
    codes = (x * (1.0 / scales[..., None])).round() + zeros[..., None]
    return codes.clamp(low, high), scales, zeros


def affine(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return what the codes mean, float32."""
    codes, scales, zeros = affine_codes(weight, bits, group)
    return ((codes.float() - zeros[..., None]) * scales.float()[..., None]).reshape(weight.shape)


def searched(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of rows (out, group): the range of least squared error."""
    levels = (1 << bits) - 1
    least, most = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    best = torch.full_like(least, math.inf)
    scales, zeros = torch.ones_like(least), torch.zeros_like(least)
    for shrink in SHRINKS:
        scale = ((most - least) * shrink / levels).clamp(min=1e-10).bfloat16().float()
        zero = (-least * shrink / scale).round().clamp(0, levels)
        codes = ((x / scale[:, None]).round() + zero[:, None]).clamp(0, levels)
        error = ((codes - zero[:, None]) * scale[:, None] - x).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def gptq(weight: Tensor, gram: Tensor, bits: int, group: int) -> Tensor:
    """Return a weight (out, in) quantized so that its outputs change least, float32.

    Args:
        weight: float32.
        gram: sum of x x^T over calibration positions, (in, in).
        bits: of a code.
        group: inputs that share a scale.
    """
    w, h = weight.clone(), gram.double()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    levels = (1 << bits) - 1
    for first in range(0, w.shape[1], group):
        end = first + group
        scale, zero = searched(w[:, first:end], bits)
        errors = torch.zeros(len(w), group, device=w.device)
        for column in range(first, end):
            x = w[:, column]
            code = ((x / scale).round() + zero).clamp(0, levels)
            made = (code - zero) * scale
            error = (x - made) / upper[column, column]
            w[:, column:end] -= error[:, None] * upper[column, column:end]
            w[:, column] = made
            errors[:, column - first] = error
        w[:, end:] -= errors @ upper[first:end, end:]
    return w


def by_ggml(weight: Tensor, name: str, library: Path) -> Tensor:
    """Return a weight quantized by llama.cpp and back; its blocks run over the ends of rows."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[name.upper()]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    values = np.ascontiguousarray(weight.float().cpu().numpy().reshape(-1, SUPERBLOCK))
    packed = np.empty((len(values), size), np.uint8)
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    done = quantize(
        *(GGML[name], values.ctypes.data, packed.ctypes.data, 0, len(values), SUPERBLOCK, None)
    )
    if done != packed.nbytes:
        raise UsageError(f"{library} wrote {done} bytes, not {packed.nbytes}")
    found = gguf.quants.dequantize(packed, kind).reshape(weight.shape)
    return torch.from_numpy(found).to(weight.device)


class _ReachedError(Exception):
    """All linears of a block have been seen."""


class Table:
    """One model in many formats, and the rows found so far."""

    def __init__(
        self, folder: Path, loaded: LoadedModel, windows: Sequence[Tensor], with_gguf: bool
    ) -> None:
        self.folder, self.loaded, self.model = folder, loaded, loaded.model
        self.windows, self.with_gguf = windows, with_gguf
        self.sites = find_sites(self.model)
        self.head: Any = self.model.get_output_embeddings()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.bfloat16())
        self.modules: dict[str, Any] = {
            x.name: self.model.get_submodule(x.name) for x in self.sites
        }
        # What all formats start from: 16-bit weights.
        self.weights = {name: x.weight.detach().bfloat16() for name, x in self.modules.items()}
        self.head_weight = self.head.weight.detach().bfloat16()
        self.head.weight = nn.Parameter(self.head_weight.float(), requires_grad=False)  # its own

    @torch.no_grad()
    def dress(self, form: Format, text: Callable[[], list[Tensor]], ggml: Path | None) -> None:
        """Give the model the weights of a format.

        Args:
            form: the format.
            text: gives windows for GPTQ.
            ggml: llama.cpp's library.
        """
        for name, module in self.modules.items():
            weight = self.weights[name]
            if form.name in GGML:
                if ggml is None:
                    raise UsageError(f"{form.name} needs --ggml libggml-base.so")
                made = by_ggml(weight, form.name, ggml)
            elif form.gptq or form.group is None or form.name == "gguf":
                made = weight.float()
            elif form.group == 0:
                codes, scales = int8_codes(weight)
                made = codes.float() * scales
            else:
                made = affine(weight, int(form.bits), form.group)
            module.weight.copy_(made)
        made = self.head_weight.float()
        if form.name not in ("bf16", "gguf"):
            codes, scales = int8_codes(self.head_weight)
            made = codes.float() * scales
        self.head.weight.copy_(made)
        if form.gptq:
            self._gptq(form, text())

    def _gptq(self, form: Format, windows: Sequence[Tensor]) -> None:
        """Quantize block by block, each from the inputs that the blocks before it leave."""
        assert form.group
        for block in dict.fromkeys(site.block for site in self.sites):
            mine = [site for site in self.sites if site.block == block]
            grams: dict[str, Tensor] = {}

            seen: set[str] = set()

            def observe(
                name: str,
                grams: dict[str, Tensor] = grams,
                seen: set[str] = seen,
                mine: list[Site] = mine,
            ) -> Any:
                def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    x = args[0].reshape(-1, args[0].shape[-1]).float()
                    grams[name] = grams.get(name, 0) + x.T @ x
                    seen.add(name)
                    if len(seen) == len(mine):
                        raise _ReachedError

                return hook

            handles = [
                self.modules[site.name].register_forward_pre_hook(observe(site.name))
                for site in mine
            ]
            for ids in windows:
                # What comes after the block is not needed.
                seen.clear()
                with suppress(_ReachedError):
                    self.model.base_model(ids.to(self.model.device), use_cache=False)
            for handle in handles:
                handle.remove()
            for site in mine:
                module = self.modules[site.name]
                found = gptq(module.weight, grams[site.name], int(form.bits), form.group)
                module.weight.copy_(found)

    def keep(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row from the folder, or make it and keep it there."""
        path = self.folder / "rows" / f"{name}.json"
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        begin = time.perf_counter()
        row = {"name": name, "model": self.loaded.name, **make()}
        row["seconds"] = round(time.perf_counter() - begin, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row), encoding="utf-8")
        note(f"{name}: perplexity {row['perplexity']:.3f}, {row['bytes'] / 1e6:.1f} MB")
        return row

    @torch.no_grad()
    def score_dense(self, form: Format, dense_prefix: int) -> dict[str, Any]:
        each = []
        for window in self.windows:
            ids = window.to(self.model.device)
            logits = self.model(ids, use_cache=False).logits[0, dense_prefix:-1]
            each.append(compare(logits, ids[0, dense_prefix + 1 :]))
        return self._row(form, DENSE, 0.0, 0.0, each, {}, {}, 0.0)

    def score(self, form: Format, method: str, plan: Plan, dense_prefix: int) -> dict[str, Any]:
        each: list[Totals] = []
        target = plan.document.target_sparsity
        what = f"{form.name} {method} {target:.0%}"
        _, counter = score_plan(self.model, plan, self.windows, dense_prefix, what, each)
        kept = {name: 1 - share for name, share in counter.by_linear().items()}
        live = {
            one.name: self._live_groups(one, plan, dense_prefix)
            for one in (form, *self._twins(form))
        }
        found = self._row(
            form, method, target, counter.sparsity, each, kept, live, extra_bytes(plan, 2)
        )
        return {**found, "allocation": plan.document.allocation}

    @torch.no_grad()
    def _live_groups(self, form: Format, plan: Plan, dense_prefix: int) -> dict[str, float]:
        """Return the share of each linear's groups in which a channel lives."""
        if not form.group:
            return {}
        live: dict[str, list[float]] = {}
        group = form.group

        def observe(name: str) -> Any:
            def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
                mask = layer.mask(args[0])[0, dense_prefix:]
                share = mask.reshape(len(mask), -1, group).any(-1).float().mean()
                live.setdefault(name, []).append(float(share))

            return hook

        with scoring(self.model, plan, dense_prefix):
            layers = list(sparse_layers(self.model))
            handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers]
            for ids in self.windows[:COUNTED_WINDOWS]:
                self.model.base_model(ids.to(self.model.device), use_cache=False)
            for handle in handles:
                handle.remove()
        return {name: sum(shares) / len(shares) for name, shares in live.items()}

    def _bytes(
        self, form: Format, kept: dict[str, float], live: dict[str, float], extra: float
    ) -> dict[str, float]:
        blocks = form.block_bytes(self.sites, kept, live) + extra
        return {"block_bytes": blocks, "bytes": blocks + form.head_bytes(self.head)}

    def _row(
        self,
        form: Format,
        method: str,
        target: float,
        sparsity: float,
        each: Sequence[Totals],
        kept: dict[str, float],
        live: dict[str, dict[str, float]],
        extra: float,
    ) -> dict[str, Any]:
        total = sum(each, Totals())
        twins = {
            one.name: self._bytes(one, kept, live.get(one.name, {}), extra)
            for one in self._twins(form)
        }
        return {
            "format": form.name,
            "method": method,
            "target": target,
            "sparsity": sparsity,
            "perplexity": total.perplexity,
            "kl": total.kl if method != DENSE else 0.0,
            "nll": [x.nll for x in each],
            "positions": [x.positions for x in each],
            **self._bytes(form, kept, live.get(form.name, {}), extra),
            "twins": twins,
        }

    def _twins(self, form: Format) -> list[Format]:
        """Return formats of the same values."""
        return [Format.parse("gguf")] if self.with_gguf and form.name == "bf16" else []


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return all rows in a folder, those of equal values and other bytes too."""
    found = []
    for path in sorted((folder / "rows").glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        found.append(row)
        found += [{**row, "format": name, **sizes} for name, sizes in row["twins"].items()]
    return sorted(found, key=lambda x: (-_bits(x["format"]), x["format"], x["target"], x["method"]))


def _bits(name: str) -> float:
    return Format.parse(name).bits


def against(row: dict[str, Any], base: dict[str, Any]) -> str:
    """Return nats a token over a row of the same windows, with the standard error over windows."""
    positions = base["positions"]
    count, total = len(positions), sum(positions)
    differences = [a - b for a, b in zip(row["nll"], base["nll"], strict=True)]
    mean = sum(differences) / total
    residuals = [d - mean * n for d, n in zip(differences, positions, strict=True)]
    error = math.sqrt(sum(x * x for x in residuals) * count / max(1, count - 1)) / total
    return f"{mean:+.3f} ± {error:.3f}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of all rows."""
    base = next((x for x in rows if x["format"] == "bf16" and x["method"] == DENSE), rows[0])
    lines = [
        "| weights | plan | target | sparsity | perplexity | nats over bf16 | MB | of blocks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for x in rows:
        target = f"{x['target']:.0%}" if x["target"] else ""
        lines.append(
            f"| {x['format']} | {x['method']} | {target} | {x['sparsity']:.3f} "
            f"| {x['perplexity']:.2f} | {against(x, base)} | {x['bytes'] / 1e6:.1f} "
            f"| {x['block_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def series_of(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the dense row and the sparse ones of each format and method, dense first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for x in rows:
        if x["method"] != DENSE:
            found.setdefault((x["format"], x["method"]), []).append(x)
    for (name, _), points in found.items():
        points += [x for x in rows if x["format"] == name and x["method"] == DENSE]
        points.sort(key=lambda x: -x["bytes"])
    return found


def perplexity_at(points: Sequence[dict[str, Any]], size: float) -> float | None:
    """Return a series' perplexity at so many bytes: its logarithm, linear between two points."""
    for one, other in pairwise(points):
        if other["bytes"] <= size <= one["bytes"] and one["bytes"] > other["bytes"]:
            share = (one["bytes"] - size) / (one["bytes"] - other["bytes"])
            a, b = math.log(one["perplexity"]), math.log(other["perplexity"])
            return math.exp(a + share * (b - a))
    return None


def at_equal_bytes(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table: each dense row of four bits or fewer, and the sparse series at its bytes."""
    series = series_of(rows)
    names = [f"{name}, {method}" for name, method in series]
    lines = [
        "| dense | MB a token | perplexity | " + " | ".join(names) + " |",
        "| --- " * (3 + len(names)) + "|",
    ]
    dense = [x for x in rows if x["method"] == DENSE and _bits(x["format"]) <= 4]
    for x in sorted(dense, key=lambda x: -x["bytes"]):
        cells = [perplexity_at(points, x["bytes"]) for points in series.values()]
        written = " | ".join("" if value is None else f"{value:.2f}" for value in cells)
        lines.append(
            f"| {x['format']} | {x['bytes'] / 1e6:.1f} | {x['perplexity']:.2f} | {written} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path, highest: float) -> None:
    """Draw perplexity over bytes a token."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    from wina.reproduce.plots import COLOURS, MARKERS

    style = {
        "svg.hashsalt": "wina",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
        best = min(x["perplexity"] for x in rows)
        formats = list(dict.fromkeys(name for name, _ in series_of(rows)))
        for (name, method), points in series_of(rows).items():
            place = formats.index(name)
            mine = [x for x in points if x["perplexity"] <= highest * best]
            axes.plot(
                [x["bytes"] / 1e6 for x in mine], [x["perplexity"] for x in mine],
                color=COLOURS[place], marker=MARKERS[place], markersize=5,
                linestyle="-" if method == LOSS else (0, (4, 2)), label=f"{name}, {method}",
            )  # fmt: skip
        low = [x for x in rows if x["method"] == DENSE and x["format"] not in formats]
        low = [x for x in low if x["perplexity"] <= highest * best]
        if low:
            axes.plot(
                [x["bytes"] / 1e6 for x in low], [x["perplexity"] for x in low], "k*",
                markersize=9, linestyle="none", label="dense, fewer bits",
            )  # fmt: skip
        for x in low:
            axes.annotate(
                x["format"], (x["bytes"] / 1e6, x["perplexity"]), xytext=(6, 3),
                textcoords="offset points", fontsize=7.5,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:.4g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("MB of weights, scales and thresholds read for a token, head included")
        axes.set_ylabel("perplexity")
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main(
    folder: Annotated[Path, typer.Argument(help="Rows, calibrations and plans are kept here.")],
    text: Annotated[Path | None, typer.Option()] = None,
    calibration_text: Annotated[Path | None, typer.Option()] = None,
    model: str = "demo",
    formats: str = "bf16,int8,int4-g32,int4-g64",
    dense_formats: str = "int3-g32,int3-g32-gptq,int3-g64-gptq,int2-g32-gptq,int2-g64-gptq",
    sparsities: str = "0.25,0.4,0.5,0.65",
    plans: Annotated[
        Path | None, typer.Option(help="Folder of tuned plans for the 16-bit weights.")
    ] = None,
    tune: Annotated[str, typer.Option(help="Sparsities to tune for, in each format.")] = "",
    tune_formats: Annotated[str, typer.Option(help="Formats to tune; all if omitted.")] = "",
    tune_steps: int = 200,
    tune_batch: int = 4,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="The file is Q4_1 with a Q8_0 head.")
    ] = False,
    ggml: Annotated[Path | None, typer.Option(help="llama.cpp's library libggml-base.so.")] = None,
    tokens: int = 20_480,
    calibration_tokens: int = 16_384,
    context: int = 1_024,
    dense_prefix: int = 20,
    highest: Annotated[float, typer.Option(help="Of the plot, times the best.")] = 4.0,
    device: str = "auto",
) -> None:
    """Fill the folder, print the tables, draw the plot."""
    chosen = [Format.parse(name) for name in formats.split(",") if name]
    low = [Format.parse(name) for name in dense_formats.split(",") if name]
    targets = [float(x) for x in sparsities.split(",") if x]
    tuned_targets = [float(x) for x in tune.split(",") if x]
    if text is not None:
        if calibration_text is None:
            raise UsageError("--text needs --calibration-text")
        loaded = load_model(model, dtype="float32", device=device)
        windows, _ = text_windows(
            loaded.model, loaded.tokenizer, [text], tokens, context, dense_prefix
        )
        table = Table(folder, loaded, windows, gguf)
        settings = CalibrationSettings(
            tokens=calibration_tokens, context=context, dense_prefix=dense_prefix
        )

        def calibration(form: Format) -> Calibration:
            path = folder / f"calibration-{form.name}"
            if path.is_dir():
                return Calibration.load(path)
            return calibrate(
                loaded.model,
                loaded.tokenizer,
                FileText((calibration_text,)),
                settings,
                name=f"{loaded.name}, {form.name}",
                output=path,
            )

        def calibration_windows() -> list[Tensor]:
            return text_windows(
                loaded.model,
                loaded.tokenizer,
                [calibration_text],
                calibration_tokens,
                context,
                dense_prefix,
            )[0]

        given = sorted(plans.glob(f"**/{DOCUMENT}")) if plans else []
        for form in chosen:
            begin = time.perf_counter()
            table.dress(form, list, ggml)
            table.keep(
                f"{form.name}-dense", lambda form=form: table.score_dense(form, dense_prefix)
            )
            for path in given:
                plan = Plan.load(str(path.parent))
                name = "tuned in 16 bits" if form.name != "bf16" else "tuned"
                target = plan.document.target_sparsity
                table.keep(
                    f"{form.name}-given-{target:g}",
                    lambda form=form, name=name, plan=plan: table.score(
                        form, name, plan, dense_prefix
                    ),
                )
            statistics = calibration(form) if targets or tuned_targets else None
            for target in targets:
                table.keep(
                    f"{form.name}-loss-{target:g}",
                    lambda form=form, target=target, statistics=statistics: table.score(
                        form,
                        LOSS,
                        make_plan(statistics, target, LOSS, model=loaded.model, refine=True),
                        dense_prefix,
                    ),
                )
            for target in tuned_targets:
                if tune_formats and form.name not in tune_formats.split(","):
                    continue
                path = folder / f"plan-{form.name}-{target:g}"
                if path.is_dir():
                    plan = Plan.load(str(path))
                else:
                    plan = tuned_plan(
                        statistics,
                        loaded.model,
                        target,
                        settings=TuningSettings(steps=tune_steps, batch=tune_batch),
                        output=path,
                    )
                    plan.save(path)
                table.keep(
                    f"{form.name}-tuned-{target:g}",
                    lambda form=form, plan=plan: table.score(form, "tuned", plan, dense_prefix),
                )
            note(f"{form.name}: {time.perf_counter() - begin:.0f} s")
        for form in low:
            if (folder / "rows" / f"{form.name}-dense.json").exists():
                continue
            begin = time.perf_counter()
            table.dress(form, calibration_windows, ggml)
            table.keep(
                f"{form.name}-dense", lambda form=form: table.score_dense(form, dense_prefix)
            )
            note(f"{form.name}: {time.perf_counter() - begin:.0f} s")
    rows = rows_of(folder)
    if not rows:
        raise UsageError(f"there are no rows in {folder}; give --text and --calibration-text")
    tables = f"{markdown(rows)}\n\nAt equal bytes:\n\n{at_equal_bytes(rows)}\n"
    (folder / "table.md").write_text(tables, encoding="utf-8")
    print(tables)
    draw(rows, folder / "bytes.svg", highest)


if __name__ == "__main__":
    typer.run(main)
