"""Input bases: run a linear on rotated inputs, so that what is dropped is a direction of x.

Linears that share an input share one basis: x is rotated once, each weight is stored rotated, and
the dense function stays what it was. One file a way to choose the rotation; a package outside
wina adds its own through the entry point group ``wina.bases``, or by calling ``register``.
"""

from wina.bases.base import Basis, BasisMaker, GroupFacts, bases, register

# Importing a file registers what it defines.
from wina.bases import pca, svd  # noqa: F401  isort: skip

__all__ = ["Basis", "BasisMaker", "GroupFacts", "bases", "register"]
