"""Models: load one, know which one it is, and find what to sparsify in it."""

from wina.models.families import Family, families, family_of
from wina.models.groups import InputGroup, input_groups, norm_scale
from wina.models.identity import identify, settle
from wina.models.loading import DEMO, LoadedModel, load_model, skeleton
from wina.models.structure import (
    Site,
    blocks,
    called_sites,
    check_bare,
    check_supported,
    context_limit,
    find_sites,
    run_body,
)
from wina.models.tokens import start_ids

__all__ = [
    "DEMO",
    "Family",
    "InputGroup",
    "LoadedModel",
    "Site",
    "blocks",
    "called_sites",
    "check_bare",
    "check_supported",
    "context_limit",
    "families",
    "family_of",
    "find_sites",
    "identify",
    "input_groups",
    "load_model",
    "norm_scale",
    "run_body",
    "settle",
    "skeleton",
    "start_ids",
]
