"""Tuned thresholds: the plan itself trained, the weights untouched.

Start from a plan, keep log t_j of every channel (and, if wanted, one output bias a linear on
sparse positions) as the only parameters, and minimise KL(dense || sparse) on calibration text.
Decoding costs what it cost before.
"""

from wina.tuning.run import (
    TUNED,
    TuningSettings,
    default_settings,
    interpolate,
    tune,
    tuned_plan,
)

__all__ = ["TUNED", "TuningSettings", "default_settings", "interpolate", "tune", "tuned_plan"]
