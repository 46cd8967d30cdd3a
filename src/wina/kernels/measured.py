"""Tables of what was measured to serve a shape best, by kind of device.

One part is shipped with the package, another comes from ``wina autotune`` and is kept in the cache
folder. Both are JSON: device kind -> shape -> fields of a configuration, or null where skipping or
masking inside a kernel does not pay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from wina.files import cached, write_text

Configuration = TypeVar("Configuration")
Job = TypeVar("Job")
Fields = dict[str, dict[str, dict[str, int] | None]]


def device_kind(device: int) -> str:
    """Return what configurations depend on of a CUDA device: its architecture and its size."""
    found = torch.cuda.get_device_properties(device)
    return f"sm_{found.major}{found.minor}/{found.multi_processor_count}"


class Measured(Generic[Configuration]):
    """One kernel's table."""

    def __init__(self, shipped: Path, make: Callable[..., Configuration]) -> None:
        """Name a table.

        Args:
            shipped: the part that comes with the package; the other one has the same file name.
            make: a dataclass of numbers.
        """
        self.shipped, self.make = shipped, make
        self._known: dict[str, dict[str, Configuration | None]] | None = None
        self._answers: dict[Hashable, Configuration | None] = {}

    @property
    def path(self) -> Path:
        """Where measurements of this machine are kept."""
        return cached("gpu", self.shipped.name)

    def of(self, kind: str) -> Mapping[str, Configuration | None]:
        """Return what is known of a kind of device, by shape."""
        if self._known is None:
            self._known = self.read(self.shipped)
            for other, entries in self.read(self.path).items():
                self._known.setdefault(other, {}).update(entries)
        return self._known.get(kind, {})

    def best(
        self, device: int, key: str, rule: Callable[[int], Configuration | None]
    ) -> Configuration | None:
        """Return what was measured on a device, else a rule's for so many multiprocessors."""
        known = self.of(device_kind(device))
        if key in known:
            return known[key]
        return rule(torch.cuda.get_device_properties(device).multi_processor_count)

    def once(
        self, asked: tuple[Any, ...], answer: Callable[..., Configuration | None]
    ) -> Configuration | None:
        """Return ``answer(*asked)``, kept until the tables change: it is asked at each launch."""
        if asked not in self._answers:
            self._answers[asked] = answer(*asked)
        return self._answers[asked]

    def remember(self, kind: str, found: Mapping[str, Configuration | None]) -> Path:
        """Keep measured configurations in the cache folder, beside those already there."""
        table = self.read(self.path)
        table.setdefault(kind, {}).update(found)
        fields: Fields = {
            kind: {key: fields_of(one) for key, one in entries.items()}
            for kind, entries in table.items()
        }
        write_text(self.path, json.dumps(fields, indent=1, sort_keys=True))
        self.forget()
        return self.path

    def extend(
        self,
        wanted: Mapping[str, Job],
        tune: Callable[[Sequence[Job]], Iterable[Configuration | None]],
        *,
        again: bool = False,
    ) -> dict[str, Configuration | None]:
        """Tune what is not known of the first device.

        Each result is kept before the next is asked for, so an interrupted run goes on.

        Args:
            wanted: what to tune, by the shape's name.
            tune: yields a configuration for each, or None, one after the other.
            again: tune what is known, too.

        Returns:
            By the shape's name, also what was known.
        """
        kind = device_kind(0)
        known = self.of(kind)
        missing = {key: job for key, job in wanted.items() if again or key not in known}
        found = {key: known[key] for key in wanted if key not in missing}
        for key, one in zip(missing, tune(list(missing.values())), strict=True):
            found[key] = one
            self.remember(kind, {key: one})
        return {key: found[key] for key in wanted}

    def forget(self) -> None:
        """Read the tables anew at the next question."""
        self._known = None
        self._answers.clear()

    def read(self, path: Path) -> dict[str, dict[str, Configuration | None]]:
        """Return a file's part; nothing if it is absent or damaged."""
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            return {
                str(kind): {
                    str(key): None if fields is None else self.make(**fields)
                    for key, fields in entries.items()
                }
                for kind, entries in content.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def fields_of(one: object) -> dict[str, int] | None:
    """Return a configuration as JSON has it."""
    if one is None:
        return None
    assert is_dataclass(one)
    assert not isinstance(one, type)
    return asdict(one)
