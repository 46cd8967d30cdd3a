"""Published methods as a whole, each one file: its paper, its departures, and how a plan is made.

A method turns a model, a calibration and a target sparsity into a plan, and a plan is all that is
ever scored. A package outside wina adds its own through the entry point group ``wina.methods``, or
by calling ``register``.
"""

from __future__ import annotations

from wina.methods.base import Method, Setting, methods, register
from wina.methods.recipe import recipe

# Importing a file registers what it defines.
from wina.methods import (  # noqa: F401  isort: skip
    cats,
    larosa,
    loss,
    oracle,
    random,
    rsparse,
    teal,
    teal_transform,
    tuned,
    wina,
    wina_paper,
    wisparse,
)

__all__ = ["Method", "Setting", "methods", "recipe", "register"]
