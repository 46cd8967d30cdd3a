"""Thresholds tuned against the dense model: the plans that come with wina (``wina tune``)."""

from __future__ import annotations

from wina.errors import UsageError
from wina.methods.base import Method, Setting, register
from wina.plan import Plan
from wina.plan.shipped import shipped_plan, shipped_sparsities


def tuned(setting: Setting, sparsity: float) -> Plan:
    """Return the plan that comes with wina; raise UsageError if there is none."""
    model = setting.calibration.document.model
    known = shipped_sparsities(model)
    if sparsity not in known:
        have = ", ".join(f"{share:.0%}" for share in known) or "no sparsity"
        raise UsageError(f"tuned plans that come with wina for this model: {have}; see wina tune")
    return shipped_plan(model, sparsity)


TUNED = register(
    Method(
        name="tuned",
        paper="wina's own (docs/method.md)",
        departures=(
            "the plans that come with wina, tuned beforehand on more text than the others read "
            "here: see their calibration's source; thresholds, and a bias on sparse positions"
        ),
        make=tuned,
        adds="a bias for each output on sparse positions",
    )
)
