import pytest
import torch
from transformers import DynamicCache

from wina.layers import Phase


class Cache:
    def __init__(self, length: int | torch.Tensor) -> None:
        self.length = length

    def get_seq_length(self) -> int | torch.Tensor:
        return self.length


def rows(phase: Phase, positions: int, past: int | torch.Tensor | None = None) -> object:
    cache = None if past is None else Cache(past)
    kwargs = {"input_ids": torch.zeros(1, positions), "past_key_values": cache}
    phase.observe(torch.nn.Identity(), (), kwargs)
    found = phase.rows
    return found.tolist() if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize(
    ("positions", "past", "sparse"),
    [(7, None, False), (7, 0, False), (1, None, False), (1, 0, False), (1, 5, True), (3, 5, False)],
)
def test_dense_prefill_makes_single_later_positions_sparse(
    positions: int, past: int | None, sparse: bool
) -> None:
    assert rows(Phase("dense"), positions, past) is sparse


def test_sparse_prefill_is_sparse_everywhere() -> None:
    phase = Phase("sparse")
    assert rows(phase, 7) is True
    assert rows(phase, 1, 3) is True


@pytest.mark.parametrize(
    ("positions", "past", "expected"),
    [
        (5, 0, [False, False, False, True, True]),
        (2, 0, False),
        (3, 0, False),
        (2, 2, [False, True]),
        (4, 3, True),
        (1, 9, True),
    ],
)
def test_the_dense_prefix_counts_from_the_sequences_start(
    positions: int, past: int, expected: object
) -> None:
    assert rows(Phase("sparse", 3), positions, past) == expected
    as_tensor = rows(Phase("sparse", 3), positions, torch.tensor(past))
    assert as_tensor == ([expected] * positions if isinstance(expected, bool) else expected)


def test_a_static_caches_length_is_not_read() -> None:
    phase = Phase("dense")
    assert rows(phase, 1, torch.tensor(4)) is True
    assert rows(phase, 4, torch.tensor(0)) is False


def test_embeddings_and_positional_arguments_are_seen() -> None:
    phase = Phase("dense")
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    embedded = {"inputs_embeds": torch.zeros(1, 1, 8), "past_key_values": cache}
    phase.observe(torch.nn.Identity(), (), embedded)
    assert phase.rows is True
    phase.observe(torch.nn.Identity(), (torch.zeros(1, 6),), {"past_key_values": cache})
    assert phase.rows is False


def test_force_holds_inside_the_block_only() -> None:
    phase = Phase("dense")
    rows(phase, 7)
    with phase.force("sparse"):
        assert rows(phase, 7) is True
        with phase.force("dense"):
            assert rows(phase, 1, 5) is False
        assert rows(phase, 7) is True
    assert phase.rows is False
    assert rows(phase, 1, 5) is True
