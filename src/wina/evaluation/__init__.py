"""Quality: perplexity, divergence from the dense model and agreement, beside real sparsity."""

from wina.evaluation.quality import DenseResult, Evaluation, SparseResult, evaluate, text_windows

__all__ = ["DenseResult", "Evaluation", "SparseResult", "evaluate", "text_windows"]
