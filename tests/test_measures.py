import math

import pytest
import torch

from wina.measures import CHUNK, Totals, compare


def test_chunks_do_not_change_the_sums() -> None:
    torch.manual_seed(0)
    logits, dense = torch.randn(2, CHUNK + 17, 11)
    targets = torch.randint(11, (CHUNK + 17,))
    found = compare(logits, targets, dense)
    log_p, log_q = logits.log_softmax(-1), dense.log_softmax(-1)
    assert found.positions == CHUNK + 17
    wanted = -log_p[range(len(targets)), targets].sum().item()
    assert found.nll == pytest.approx(wanted, rel=1e-5)
    assert found.dense_nll == pytest.approx(-log_q[range(len(targets)), targets].sum().item())
    assert found.divergence == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), rel=1e-4)
    assert found.agreed == int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def test_a_model_agrees_with_itself() -> None:
    logits = torch.randn(5, 7)
    found = compare(logits, torch.zeros(5, dtype=torch.long), logits)
    assert (found.kl, found.agreement) == (0, 1)
    assert found.perplexity == found.dense_perplexity


def test_no_positions_and_huge_losses() -> None:
    assert Totals().kl == 0
    assert Totals(positions=1, nll=1e6).perplexity == math.inf


def test_totals_add_up() -> None:
    total = Totals(1, 2.0, 3.0, 4.0, 1) + Totals(1, 4.0, 1.0, 0.0, 0)
    assert total == Totals(2, 6.0, 4.0, 4.0, 1)
    assert total.perplexity == pytest.approx(math.exp(3))
    assert (total.kl, total.agreement) == (2.0, 0.5)
