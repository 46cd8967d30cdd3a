"""Principal components of the inputs, as LaRoSA uses them (arXiv 2507.01299).

Rotated inputs are uncorrelated, and their power is concentrated in few channels.
"""

import torch
from torch import Tensor

from wina.bases.base import BasisMaker, GroupFacts, register
from wina.errors import UsageError


def principal_components(facts: GroupFacts) -> Tensor:
    """Q = the eigenvectors of E[z z^T], columns by falling eigenvalue."""
    if facts.covariance is None:
        raise UsageError("basis 'pca' needs the inputs' covariance, which was not collected")
    vectors: Tensor = torch.linalg.eigh(facts.covariance).eigenvectors
    return vectors.flip(-1)


PCA = register(BasisMaker("pca", principal_components, needs_covariance=True))
