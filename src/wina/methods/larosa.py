"""LaRoSA: magnitudes in the basis of the inputs' principal components, top-k."""

from wina.methods.base import Method, register
from wina.methods.recipe import recipe

LAROSA = register(
    Method(
        name="larosa",
        paper="La RoSA, arXiv 2507.01299",
        departures=(
            "inputs of q, k, v and gate, up are rotated where they enter, not in the residual "
            "stream; o_proj and down_proj keep their own basis; the covariance is of inputs with "
            "the norm's weight folded into the linears; one sparsity for all linears"
        ),
        make=recipe("teal", "uniform", "topk", basis="pca"),
        basis="pca",
    )
)
