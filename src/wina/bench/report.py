"""What a benchmark says; its JSON form is this schema."""

from __future__ import annotations

from pydantic import BaseModel


class Baseline(BaseModel):
    """A dense way to decode.

    Attributes:
        same_precision: whether its weights are as wide as the sparse model's. Others are shown
            for reference and are never the best baseline.
        milliseconds: of a step, the median of rounds.
        note: how it was made, or why it is missing.
    """

    name: str
    tokens_per_second: float | None
    milliseconds: float | None = None
    same_precision: bool = True
    note: str = ""


class SparseResult(BaseModel):
    """One target sparsity.

    Attributes:
        sparsity: the target.
        realized_sparsity: share of the planned linears' weights that decoded tokens skipped.
        speedup: over the fastest dense baseline of the same precision.
        touched_gbps: bytes of weights and of the keys and values really read, a second.
        byte_speedup: dense bytes / touched bytes: the speedup that the bytes alone allow.
        byte_efficiency: speedup / byte_speedup.
        same_text: whether greedy text equals that of the reference kernels; None: not compared.
        text_note: where it first differs, and how far apart the two candidates were there.
    """

    sparsity: float
    tokens_per_second: float
    milliseconds: float
    speedup: float
    touched_gbps: float
    realized_sparsity: float
    byte_speedup: float
    byte_efficiency: float
    same_text: bool | None = None
    text_note: str = ""


class BenchReport(BaseModel):
    """One run of the benchmark; all timings were interleaved in it."""

    device: str
    dtype: str
    threads: int
    model: str
    method: str
    include_head: bool
    context: int
    batch: int
    read_bandwidth_gbps: float
    dense_bytes: int
    prefill_tokens: int
    prefill_ms: dict[str, float]
    baselines: list[Baseline]
    results: list[SparseResult]
    versions: dict[str, str]
