"""Quality: perplexity, divergence from the dense model and agreement, beside real sparsity."""

from wina.evaluation.quality import DenseResult, Evaluation, SparseResult, evaluate, text_windows
from wina.evaluation.recommend import Limits, Recommendation, limit_windows, recommend

__all__ = [
    "DenseResult",
    "Evaluation",
    "Limits",
    "Recommendation",
    "SparseResult",
    "evaluate",
    "limit_windows",
    "recommend",
    "text_windows",
]
