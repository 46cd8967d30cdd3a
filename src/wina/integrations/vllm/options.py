"""What a user may ask of wina in vLLM: ``--additional-config '{"wina": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from wina.errors import UsageError


@dataclass(frozen=True)
class Options:
    """The options, all for CPUs.

    Attributes:
        dense_copy: keep vLLM's packed weights beside the input-major ones, for many rows.
        batch_invariant: in 16-bit dtypes too, give a request the same bits in any batch.
    """

    dense_copy: bool = False
    batch_invariant: bool = False


def options_of(additional_config: Any) -> Options:
    """Return what vLLM's ``additional_config`` asks for.

    Raises:
        UsageError: it has something else under ``wina``.
    """
    given = additional_config.get("wina", {}) if isinstance(additional_config, Mapping) else {}
    known = {field.name for field in fields(Options)}
    if not isinstance(given, Mapping) or given.keys() - known:
        names = " and ".join(sorted(known))
        raise UsageError(f"additional_config's wina takes {names}; got {given!r}")
    return Options(**{name: bool(value) for name, value in given.items()})
