"""Criteria: how much an input channel matters.

A criterion gives every input channel j of a linear a scale s_j; a token's channel has the score
|x_j| * s_j. Within a linear, dropping the lowest scores is the same as comparing |x_j| with the
threshold t_j = tau / s_j, so whatever the criterion, the layer that runs it only ever sees a
vector of thresholds.

One file a criterion. A package outside wina adds its own through the entry point group
``wina.criteria``, or by calling ``register``.
"""

from __future__ import annotations

from wina.criteria.base import Criterion, LinearFacts, criteria, register

# Importing a file registers what it defines.
from wina.criteria import loss, teal, wina, wina_kgate  # noqa: F401  isort: skip

__all__ = ["Criterion", "LinearFacts", "criteria", "register"]
