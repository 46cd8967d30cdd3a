"""Sparse layers: linears that skip the input channels which a plan's thresholds drop."""

from wina.layers.experts import opened
from wina.layers.layout import lay_out_for_decode, measure_batches
from wina.layers.linear import SparseConv1D, SparseLayer, SparseLinear, sparse_layers
from wina.layers.masked import MaskedLayer
from wina.layers.phase import Phase
from wina.layers.scoring import SparsityCounter, scoring
from wina.layers.swap import change_vectors, densify, phase_of, sparsify
from wina.layers.watch import ChangedWeightsWarning
from wina.layers.widen import widened

__all__ = [
    "ChangedWeightsWarning",
    "MaskedLayer",
    "Phase",
    "SparseConv1D",
    "SparseLayer",
    "SparseLinear",
    "SparsityCounter",
    "change_vectors",
    "densify",
    "lay_out_for_decode",
    "measure_batches",
    "opened",
    "phase_of",
    "scoring",
    "sparse_layers",
    "sparsify",
    "widened",
]
