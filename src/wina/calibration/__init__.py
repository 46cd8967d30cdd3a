"""Calibration: from a model and some text to statistics of kilobytes a linear.

``run.calibrate`` is the way through: text -> tokens -> gradients -> scores -> verdict, each stage
streaming and resumable. ``Calibration`` is what comes out; its ``plan`` makes a plan for any
target sparsity without the model.
"""

from wina.calibration.artifact import Calibration, CalibrationDocument, Verdict
from wina.calibration.planning import make_plan
from wina.calibration.run import CalibrationSettings, calibrate
from wina.calibration.text import (
    DatasetText,
    DefaultText,
    DocsText,
    FileText,
    MixedText,
    SelfText,
    TextSource,
    default_text,
)

__all__ = [
    "Calibration",
    "CalibrationDocument",
    "CalibrationSettings",
    "DatasetText",
    "DefaultText",
    "DocsText",
    "FileText",
    "MixedText",
    "SelfText",
    "TextSource",
    "Verdict",
    "calibrate",
    "default_text",
    "make_plan",
]
