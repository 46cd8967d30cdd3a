"""Oracle: each linear's mask by its exact output error, W^T W and all. For scoring alone.

It shows what a mask of one linear can do, not what a model can: linears are judged one by one.
"""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

ORACLE = register(
    Method(
        name="oracle",
        paper="a bound on masks of single linears (docs/method.md)",
        departures=(
            "uniform; greedy trades of channels in 16 rounds, from the norms' mask on, each kept "
            "where it lowers the token's error"
        ),
        make=recipe("wina", "uniform", "oracle"),
        adds="W^T W for each linear and token; for scoring alone",
    )
)
