from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

import wina
from tests import families
from wina.layers.experts import is_experts
from wina.measures import score_plan
from wina.tuning import TuningSettings, tune


def test_tuning_reaches_experts(tokenizer: PreTrainedTokenizerFast, text: Path) -> None:
    model = families.make(families.EXPERTS[0])
    settings = {"tokens": 768, "context": 128, "dense_prefix": 4}
    calibration = wina.calibrate(model, tokenizer, text, verdict=False, **settings)
    start = calibration.plan(0.5, "wina", "uniform", model=model, refine=True)
    tuned = tune(model, calibration, start, TuningSettings(steps=12, batch=1, evaluations=2))
    assert any(is_experts(module) for module in model.modules())
    assert tuned.document.realized_sparsity is not None
    assert abs(tuned.document.realized_sparsity - 0.5) < 0.02
    changed = [n for n, v in tuned.vectors.items() if not torch.equal(v, start.vectors[n])]
    assert any(".experts." in name for name in changed)
    windows = calibration.windows()
    losses = [score_plan(model, plan, windows, 4, "")[0].kl for plan in (start, tuned)]
    assert losses[1] < losses[0]
