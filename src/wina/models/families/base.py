"""What a family spec is, and the registry of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from wina.layers.linear import know_linear
from wina.registry import Registry


@dataclass(frozen=True)
class Family:
    """What structure cannot tell of a family of models.

    Attributes:
        name: of the family.
        model_types: the configs' ``model_type`` that belong to it.
        linears: qualified names of subclasses of nn.Linear that compute W x + b as it does (a
            subclass is otherwise left alone, since it may compute anything).
        dense: patterns of linears that stay dense, such as a router, matched with the end of the
            qualified name (``*`` stands for anything).
        kinds: common kinds (q_proj, k_proj, v_proj, qkv_proj, o_proj, gate_proj, up_proj,
            gate_up_proj, down_proj) by the family's own names, matched in the same way. Criteria
            that treat kinds differently and reports by kind go by them.
        refusal: why wina cannot sparsify the family, as the end of a sentence; None if it can.
    """

    name: str
    model_types: tuple[str, ...]
    linears: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    refusal: str | None = None

    def kind(self, name: str) -> str:
        """Return the kind of the linear of this qualified name."""
        common = (common for own, common in self.kinds.items() if _ends(name, own))
        return next(common, name.rpartition(".")[2])

    def stays_dense(self, name: str) -> bool:
        """Return whether the linear of this qualified name is left alone."""
        return any(_ends(name, pattern) for pattern in self.dense)


def _ends(name: str, pattern: str) -> bool:
    return fnmatch(f".{name}", f"*.{pattern}")


families: Registry[Family] = Registry("family", "families")
NONE = Family("", ())


def register(family: Family) -> Family:
    """Make a family known."""
    return families.add(family.name, family)


def family_of(model: nn.Module) -> Family:
    """Return the spec of a model's family, or an empty one for the many that need none."""
    known = [families.get(name) for name in families]
    for family in known:
        for linear in family.linears:
            know_linear(linear)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    types = {getattr(part, "model_type", None) for part in (config, text)}
    return next((family for family in known if types & set(family.model_types)), NONE)
