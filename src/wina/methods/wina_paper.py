"""WINA as published: column-orthogonal transform, norms on k and gate, greedy, top-k."""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

WINA_PAPER = register(
    Method(
        name="wina-paper",
        paper="WINA, arXiv 2505.19427, and its code",
        departures=(
            "the rotation is applied to the inputs of q, k, v and gate, up instead of the residual "
            "stream (the same masks, results and cost); greedy steps of 2.5 % of a block"
        ),
        make=recipe("wina-kgate", "greedy", "topk", basis="svd"),
        basis="svd",
        seeded=True,
    )
)
