"""Column-orthogonal: Q from the SVD of the leader's weight (arXiv 2505.19427, section 3.3).

With W = U S V^T and Q = V, the columns of W Q = U S are orthogonal, so that for this linear the
squared error of dropping channels is the sum of (x_j ||W_:j||)^2 and WINA's mask is optimal. The
other linears of the group share the input and so the rotation, not the orthogonality. Where the
leader has fewer outputs than inputs (k_proj with grouped-query attention), the last columns of
W Q are zero.
"""

import torch
from torch import Tensor

from wina.bases.base import BasisMaker, GroupFacts, register


def right_singular_vectors(facts: GroupFacts) -> Tensor:
    """Q = V of W = U S V^T, columns by falling singular value."""
    # On the CPU: LAPACK's is as fast here as the GPU's and the same everywhere.
    weight = facts.weight.cpu()
    if weight.shape[0] > weight.shape[1]:  # R has the singular values and V of W = O R
        weight = torch.linalg.qr(weight, mode="r").R
    vectors: Tensor = torch.linalg.svd(weight, full_matrices=True).Vh.T
    return vectors.to(facts.weight.device)


SVD = register(BasisMaker("svd", right_singular_vectors))
