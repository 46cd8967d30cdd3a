"""Which rows of a batch are sparse: by their own position in their own request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wina.integrations.vllm.rows import MOST, Batch, sparse_rows


def rows(*requests: tuple[int, int, int], **options: object) -> list[bool]:
    """Return sparse_rows of requests (first, count, prompt)."""
    first, counts, prompts = (np.array(x, dtype=np.int32) for x in zip(*requests, strict=True))
    return sparse_rows(first, counts, prompts, **options).tolist()


def test_a_prompt_is_dense_and_what_follows_is_sparse() -> None:
    assert rows((0, 3, 3)) == [False] * 3
    assert rows((3, 1, 3)) == [True]


def test_the_last_position_of_a_prompt_alone_is_dense() -> None:
    # As when the others were cached: one row, yet of the prompt.
    assert rows((2, 1, 3), (7, 1, 7)) == [False, True]


def test_recomputed_after_a_preemption() -> None:
    # A prompt of 3 and 4 tokens written before; computed again in chunks of 2.
    chunks = [rows((first, min(2, 7 - first), 3)) for first in range(0, 7, 2)]
    assert [row for chunk in chunks for row in chunk] == [False] * 3 + [True] * 4


def test_drafts_are_sparse() -> None:
    assert rows((5, 4, 5)) == [True] * 4


def test_sparse_prefill_has_a_dense_prefix() -> None:
    assert rows((0, 4, 9), prefill="sparse", dense_prefix=2) == [False, False, True, True]
    assert rows((0, 2, 9), (6, 1, 3), prefill="sparse") == [True] * 3


requests = st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(1, 30))


@given(st.lists(requests, min_size=1, max_size=6), st.data())
def test_no_row_depends_on_the_batch_or_the_chunk(
    batch: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    together = rows(*batch)
    assert together == [row for request in batch for row in rows(request)]
    first, count, prompt = batch[0]
    cut = data.draw(st.integers(1, count))
    if cut < count:
        halves = rows((first, cut, prompt)) + rows((first + cut, count - cut, prompt))
        assert halves == rows(batch[0])
    assert rows(batch[0]) == [position >= prompt for position in range(first, first + count)]


def start(batch: Batch, *requests: tuple[int, int, int]) -> None:
    batch.start(*(np.array(x, dtype=np.int32) for x in zip(*requests, strict=True)))


def test_a_batch_knows_its_kind_and_places() -> None:
    batch = Batch()
    assert batch.kind == "mixed"
    start(batch, (0, 3, 3))
    assert batch.kind == "dense"
    start(batch, (3, 1, 3), (9, 1, 2))
    assert batch.kind == "sparse"
    start(batch, (3, 1, 3), (0, 2, 4))
    assert batch.kind == "mixed"
    sparse, dense = batch.places(5)  # two of padding
    assert sparse.tolist() == [0, 3, 4]
    assert dense.tolist() == [1, 2]


def test_flags_on_a_device_stay_in_place() -> None:
    batch, device = Batch(), torch.device("cpu")
    batch.prepare(device)
    flags = batch.flags(device, 6)
    if not torch.cuda.is_available():  # no pinned memory here: follow what is copied
        pytest.MonkeyPatch().setattr(torch.Tensor, "pin_memory", lambda self: self)
    start(batch, (0, 4, 3))
    assert flags.tolist() == [False, False, False, True, True, True]
    start(batch, (0, 1, 3))
    assert flags.tolist() == [False] + [True] * 5
    assert batch.flags(device, 6).data_ptr() == flags.data_ptr()


def test_a_batch_that_is_too_large() -> None:
    with pytest.raises(ValueError, match=str(MOST)):
        start(Batch(), (0, MOST + 1, 3))
