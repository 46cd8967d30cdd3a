"""Loss-aware: |x_j| * rms(dL/dx_j).

Dropping x_j changes the loss by x_j dL/dx_j to first order, which is zero on average over tokens
at a trained model, and by about x_j^2 (dL/dx_j)^2 / 2 to second order: the Fisher approximation
of the curvature, as in optimal brain damage (LeCun et al., 1990) but for activations. The mean
of the squared gradient is weighted by x_j^2, so that E[(x_j s_j)^2] is E[(x_j dL/dx_j)^2] whether
or not the two are independent. Scores are in nats, so linears can be compared with each other.
"""

from torch import Tensor

from wina.criteria.base import Criterion, LinearFacts, register
from wina.errors import UsageError


def gradient_rms(facts: LinearFacts) -> Tensor:
    """s_j = weighted rms of dL/dx_j; raise UsageError if gradients were not collected."""
    if facts.gradient_rms is None:
        raise UsageError(
            "criterion 'loss' needs gradients, which this calibration lacks; "
            "calibrate again without --no-gradient"
        )
    return facts.gradient_rms


LOSS = register(Criterion("loss", gradient_rms, needs_gradient=True, comparable=True))
