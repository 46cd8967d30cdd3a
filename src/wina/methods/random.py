"""Random channels of every token: what any method must beat. For scoring alone."""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

RANDOM = register(
    Method(
        name="random",
        paper="a lower bound",
        departures="uniform; pseudo-random by a hash of the input's bits",
        make=recipe("teal", "uniform", "random"),
        adds="a mask that is drawn, not computed; for scoring alone",
    )
)
