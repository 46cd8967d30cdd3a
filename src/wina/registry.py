"""Named extension points: adding an entry is one new file, in this package or in yours."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from wina.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name.

    Packages outside wina add to it through the entry point group ``wina.<group>``; those are
    loaded when a name is looked up that is not there yet, or all names are: never while wina
    itself is imported, since they may import it.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = f"wina.{group}"
        self._entries: dict[str, T] = {}
        self._plugins_loaded = False

    def add(self, name: str, entry: T) -> T:
        """Register ``entry``; raise UsageError if the name is taken by another object."""
        if self._entries.get(name, entry) is not entry:
            raise UsageError(f"{self.kind} {name!r} is already registered")
        self._entries[name] = entry
        return entry

    def get(self, name: str, also: Sequence[str] = ()) -> T:
        """Return the entry; raise UsageError with a did-you-mean if there is none.

        ``also`` are names that are known elsewhere, for the message.
        """
        if name not in self._entries:
            self._load_plugins()
        if name not in self._entries:
            known = sorted([*self._entries, *also])
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known)}.")
        return self._entries[name]

    @property
    def own(self) -> tuple[str, ...]:
        """The names registered so far, without loading other packages' entries."""
        return tuple(sorted(self._entries))

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(sorted(self._entries))

    def _load_plugins(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for plugin in entry_points(group=self.group):
                entry = plugin.load()
                if plugin.name not in self._entries:
                    self.add(plugin.name, entry)
