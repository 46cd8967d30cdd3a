"""TEAL on the weights that WINA's transform has rotated: WINA's paper's strongest baseline."""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

TEAL_TRANSFORM = register(
    Method(
        name="teal-transform",
        paper="TEAL-transform in arXiv 2505.19427",
        departures="those of wina-paper",
        make=recipe("teal", "greedy", "topk", basis="svd"),
        basis="svd",
        seeded=True,
    )
)
