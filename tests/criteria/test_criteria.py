import pytest
import torch

from wina.criteria import LinearFacts, criteria
from wina.errors import UsageError


def facts(kind: str = "q_proj", gradient: bool = True) -> LinearFacts:
    return LinearFacts(
        kind, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.0]) if gradient else None
    )


def test_wina_is_the_column_norm_everywhere() -> None:
    wina = criteria.get("wina")
    for kind in ("q_proj", "down_proj"):
        assert torch.equal(wina.scale(facts(kind)), facts().column_norm)


def test_teal_is_the_magnitude_alone() -> None:
    assert criteria.get("teal").scale(facts()).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        ("k_proj", True),
        ("gate_proj", True),
        ("qkv_proj", True),
        ("gate_up_proj", True),
        ("q_proj", False),
        ("v_proj", False),
        ("o_proj", False),
        ("up_proj", False),
        ("down_proj", False),
    ],
)
def test_wina_kgate_has_norms_on_k_and_gate_only(kind: str, norms: bool) -> None:
    expected = [1.0, 2.0, 3.0] if norms else [1.0, 1.0, 1.0]
    assert criteria.get("wina-kgate").scale(facts(kind)).tolist() == expected


def test_loss_is_the_gradient_and_says_when_there_is_none() -> None:
    loss = criteria.get("loss")
    assert loss.needs_gradient
    assert loss.comparable
    found = facts()
    assert torch.equal(loss.scale(found), found.gradient_rms)
    with pytest.raises(UsageError, match="--no-gradient"):
        loss.scale(facts(gradient=False))
