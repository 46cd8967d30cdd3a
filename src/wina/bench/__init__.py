"""Whole-model decode speed, dense and sparse, beside the bandwidth it could use."""

from wina.bench.configs import CONFIGS, RandomText, random_calibration, random_model
from wina.bench.report import Baseline, BenchReport, SparseResult
from wina.bench.run import BASELINES, BenchSettings, bench

__all__ = [
    "BASELINES",
    "CONFIGS",
    "Baseline",
    "BenchReport",
    "BenchSettings",
    "RandomText",
    "SparseResult",
    "bench",
    "random_calibration",
    "random_model",
]
