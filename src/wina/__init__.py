"""wina: training-free activation sparsity that makes large language models decode faster.

calib = wina.calibrate(model, tokenizer)
plan = calib.plan(sparsity=0.5)
wina.sparsify(model, plan)
"""

from importlib.metadata import version

from wina.api import calibrate, densify, sparsify
from wina.calibration import Calibration
from wina.errors import UsageError, WinaError
from wina.integrations import hf as _hf
from wina.layers import lay_out_for_decode
from wina.plan import Plan

__version__ = version("wina")
__all__ = [
    "Calibration",
    "Plan",
    "UsageError",
    "WinaError",
    "calibrate",
    "densify",
    "lay_out_for_decode",
    "sparsify",
]

_hf.register()
