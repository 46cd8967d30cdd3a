"""WINA's criterion alone: |x_j| ||W_:j|| on every projection, uniform, top-k, no transform."""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

WINA = register(
    Method(
        name="wina",
        paper="WINA, arXiv 2505.19427",
        departures="no transform, uniform sparsity, norms on all projections",
        make=recipe("wina", "uniform", "topk"),
    )
)
