"""Which rows of a batch are sparse: the positions after each request's prompt.

An engine computes many requests in one batch, some in their prompts and some past them. A row is
sparse by its own position in its own request and by nothing else, so that what else is in the
batch, how a prompt is cut into chunks, and whether a request was preempted and is computed again
change no mask. The runner says what is in a batch before it runs the model (``Batch.start``); the
operators read it while the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wina.layers.phase import Mode

MOST = 1 << 17  # rows of a batch
Kind = Literal["dense", "sparse", "mixed"]


def sparse_rows(
    first: NDArray[np.integer],
    counts: NDArray[np.integer],
    prompts: NDArray[np.integer],
    prefill: Mode = "dense",
    dense_prefix: int = 0,
) -> NDArray[np.bool_]:
    """Return True for the rows that are sparse, request after request, shape (sum of counts,).

    Args:
        first: position of each request's first row, shape (requests,).
        counts: rows of each request.
        prompts: length of each request's prompt.
        prefill: "dense" leaves the prompt's positions dense; with "sparse" it does not matter
            what is prompt.
        dense_prefix: with sparse prefill, the number of first positions that stay dense.
    """
    limits = prompts if prefill == "dense" else np.full_like(prompts, dense_prefix)
    # Row i of a request is at position first + i, and sparse from the position `limit` on.
    ends = np.cumsum(counts)
    dense = np.clip(limits - first, 0, counts)
    offsets = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    found: NDArray[np.bool_] = offsets >= np.repeat(dense, counts)
    return found


class Batch:
    """The running batch's rows. Rows past its end are padding, and count as sparse.

    Attributes:
        prefill: see ``sparse_rows``; the plan's.
        dense_prefix: likewise.
        exact: whether a row's results must have the same bits in any batch; float32's always do.
        kind: what its rows are; "mixed" too while it is not known, as when an engine warms up.
        used: rows that are not padding.
        started: called whenever a batch was taken.
    """

    def __init__(self) -> None:
        self.prefill: Mode = "dense"
        self.dense_prefix = 0
        self.exact = False
        self.kind: Kind = "mixed"
        self._flags = np.ones(MOST, dtype=np.bool_)
        self.used = 0
        self.started: Callable[[], None] = lambda: None
        self._on_device: dict[torch.device, Tensor] = {}
        self._places: dict[tuple[int, torch.device | None], tuple[Tensor, Tensor]] = {}

    def start(
        self,
        first: NDArray[np.integer],
        counts: NDArray[np.integer],
        prompts: NDArray[np.integer],
    ) -> None:
        """Take the batch that runs next; arguments as of ``sparse_rows``.

        Copies to devices are queued before the model's own work, and nothing waits for them.
        """
        rows = sparse_rows(first, counts, prompts, self.prefill, self.dense_prefix)
        count = len(rows)
        if count > MOST:
            raise ValueError(f"a batch of {count} rows; at most {MOST} can be told apart")
        if not rows.any():
            self.kind = "dense"
        else:
            self.kind = "sparse" if rows.all() else "mixed"
        used = max(count, self.used)
        before = self._flags[:used].copy()
        self._flags[: self.used] = True
        self._flags[:count] = rows
        self.used = count
        self._places.clear()
        if not np.array_equal(before, self._flags[:used]):
            for flags in self._on_device.values():
                # From memory of its own, so that a copy still under way is not overwritten.
                fresh = torch.from_numpy(self._flags[:used].copy()).pin_memory()
                flags[:used].copy_(fresh, non_blocking=True)
        self.started()

    def places(self, rows: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return the indices of the sparse and of the dense among the first ``rows`` rows.

        They lie on a device, or else on the CPU.
        """
        found = self._places.get((rows, device))
        if found is None:
            flags = torch.from_numpy(self._flags[:rows])
            each = (flags.nonzero()[:, 0], flags.logical_not().nonzero()[:, 0])
            first, second = (one.to(device, non_blocking=True) for one in each)
            found = self._places[rows, device] = first, second
        return found

    def prepare(self, device: torch.device) -> None:
        """Keep a copy of the rows on a device from now on; always the same memory."""
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(self._flags.copy()).to(device)

    def flags(self, device: torch.device, rows: int) -> Tensor:
        """Return True for the sparse ones of the first ``rows`` rows, a view on the device."""
        return self._on_device[device][:rows]


BATCH = Batch()
