"""Family specs: the little that structure cannot tell, one file a family.

Most families need none. A package outside wina adds its own through the entry point group
``wina.families``, whose entries are ``Family`` objects, or by calling ``register``.
"""

from wina.models.families.base import Family, families, family_of, register

# Importing a file registers what it defines.
from wina.models.families import (  # noqa: F401  isort: skip
    deepseek_sparse,
    falcon,
    gemma3n,
    gpt2,
    gpt_neox,
    jetmoe,
    lfm2,
    mpt,
    opt,
    starcoder2,
)

__all__ = ["Family", "families", "family_of", "register"]
