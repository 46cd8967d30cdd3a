"""One progress bar for all long work: on standard error, silent where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

console = Console(stderr=True)
_depth = 0  # of bars; what runs inside one shows none of its own


def note(text: str, style: str = "dim") -> None:
    """Print a line on standard error as it is: square brackets in it are not markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar inside the block and yield the function that advances it."""
    global _depth
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=_depth > 0 or not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task(description, total=total, completed=done)
        _depth += 1
        try:
            yield lambda steps: progress.advance(task, steps)
        finally:
            _depth -= 1


def hide_bars() -> None:
    """Show no bar in this process from here on: the one that started it shows one."""
    global _depth
    _depth += 1


def track(items: Iterable[T], description: str, total: int, done: int = 0) -> Iterator[T]:
    """Yield ``items``, showing how many of ``total`` are done; ``done`` were done before."""
    with bar(description, total, done) as advance:
        for item in items:
            yield item
            advance(1)
