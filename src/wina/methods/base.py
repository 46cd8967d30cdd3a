"""What a method is, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from transformers import PreTrainedModel

from wina.calibration import Calibration
from wina.calibration.planning import GREEDY_TOKENS
from wina.errors import UsageError
from wina.layers.extras import check_readable
from wina.layers.linear import read_by_others
from wina.plan import Plan
from wina.registry import Registry
from wina.selection import check_sparsity

T = TypeVar("T")


@dataclass
class Setting:
    """What a method makes plans of.

    Attributes:
        model: dense; dense again when a plan is made.
        calibration: of the model.
        sparsities: all targets that will be asked for, so that one search may serve them all.
        seed: of what is random, and of which part of the calibration text a search reads.
        search_tokens: of calibration text that a greedy search reads.
    """

    model: PreTrainedModel
    calibration: Calibration
    sparsities: Sequence[float] = ()
    seed: int = 0
    search_tokens: int = GREEDY_TOKENS
    _made: dict[Any, Any] = field(default_factory=dict)

    def reseeded(self, seed: int) -> Setting:
        """Return the same setting under another seed; what was made once is shared."""
        return replace(self, seed=seed)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what ``make`` returned the first time it was asked for under ``key``."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        name: what users type.
        paper: where it is from.
        departures: what is done otherwise here than there; empty if nothing is.
        make: maps a setting and a sparsity to a plan; raises UsageError if the model or the
            sparsity is out of its reach.
        basis: the input basis its linears run in, if any.
        adds: what it adds to the linears that no kernel runs (and ``wina cost`` cannot count).
        seeded: its plan depends on the setting's seed.
    """

    name: str
    paper: str
    departures: str
    make: Callable[[Setting, float], Plan]
    basis: str | None = None
    adds: str = ""
    seeded: bool = False

    def plan(self, setting: Setting, sparsity: float) -> Plan:
        """Return a plan under the method's name; raise UsageError as ``make`` does."""
        if check_sparsity(sparsity) == 0:
            raise UsageError("a method's sparsity must be above 0")
        if self.basis or self.adds:
            check_readable(setting.model, read_by_others(setting.model))
        plan = self.make(setting, sparsity)
        document = plan.document.model_copy(update={"method": self.name})
        return Plan(document, plan.vectors, plan.biases, plan.parts)


methods: Registry[Method] = Registry("method", "methods")


def register(method: Method) -> Method:
    """Make a method known by its name."""
    return methods.add(method.name, method)
