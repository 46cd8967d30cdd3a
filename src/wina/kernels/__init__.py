"""Kernels: y = W (mask o x) + b, computed by whichever backend is fastest where it runs."""

from wina.kernels.ops import sparse_linear

__all__ = ["sparse_linear"]
