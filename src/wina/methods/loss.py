"""What wina itself does without training: s_j = rms dL/dx_j, global allocation, thresholds."""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

LOSS = register(
    Method(
        name="loss",
        paper="wina's own (docs/method.md)",
        departures="",
        make=recipe("loss", "global", "threshold"),
    )
)
