"""TEAL: magnitudes, greedy allocation inside blocks."""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

TEAL = register(
    Method(
        name="teal",
        paper="TEAL, arXiv 2408.14690",
        departures="top-k instead of thresholds, as WINA's paper compares; steps of 2.5 %",
        make=recipe("teal", "greedy", "topk"),
        seeded=True,
    )
)
