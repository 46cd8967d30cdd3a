from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import wina
from tests.helpers import make_model, make_tokenizer, prompt
from tests.layers.test_swap import assert_same, fingerprint
from wina.errors import WinaError
from wina.layers import phase_of


def test_the_readmes_way(each_model: PreTrainedModel, text: Path, tmp_path: Path) -> None:
    before = fingerprint(each_model)
    calibration = wina.calibrate(each_model, make_tokenizer(), text, tokens=512, context=64)
    plan = calibration.plan(sparsity=0.5, method="wina", allocation="global")
    plan.save(tmp_path / "plan")
    assert wina.sparsify(each_model, wina.Plan.load(tmp_path / "plan")) is each_model
    assert phase_of(each_model) is not None
    assert wina.densify(each_model) is each_model
    assert_same(fingerprint(each_model), before)


def test_zero_sparsity_from_a_real_plan_is_bit_equal(
    each_model: PreTrainedModel, text: Path
) -> None:
    wanted = each_model(prompt()).logits
    calibration = wina.calibrate(each_model, make_tokenizer(), text, tokens=512, context=64)
    for selection in ("threshold", "topk"):
        plan = calibration.plan(0.0, selection=selection, include_head=True)
        sparse = plan.document.model_copy(update={"prefill": "sparse"})
        wina.sparsify(each_model, wina.Plan(sparse, plan.vectors))
        assert torch.equal(each_model(prompt()).logits, wanted)


def test_a_plan_of_other_weights_is_refused_unless_told_otherwise(
    model: PreTrainedModel, calibration: tuple[Path, wina.Calibration]
) -> None:
    plan = calibration[1].plan(0.5)
    other = make_model("qwen3", seed=1)
    before = fingerprint(other)
    with pytest.raises(WinaError, match="the same architecture with other weights"):
        wina.sparsify(other, plan)
    assert_same(fingerprint(other), before)
    with pytest.raises(WinaError, match="another architecture"):
        wina.sparsify(make_model("mistral"), plan)
    wina.sparsify(other, plan, check=False)
    assert phase_of(other) is not None
    wina.sparsify(model, plan)


def test_a_sparse_model_keeps_its_identity_and_takes_a_new_plan(
    model: PreTrainedModel, calibration: tuple[Path, wina.Calibration]
) -> None:
    before = fingerprint(model)
    wina.sparsify(model, calibration[1].plan(0.3))
    wina.sparsify(model, calibration[1].plan(0.6))
    assert model.config.quantization_config.document.target_sparsity == 0.6
    wina.densify(model)
    assert_same(fingerprint(model), before)


def test_only_a_dense_model_in_evaluation_mode_is_calibrated(
    model: PreTrainedModel, calibration: tuple[Path, wina.Calibration], text: Path
) -> None:
    def calibrate() -> None:
        wina.calibrate(model, make_tokenizer(), text, tokens=512, context=64)

    wina.sparsify(model, calibration[1].plan(0.5))
    with pytest.raises(wina.UsageError, match="densify"):
        calibrate()
    wina.densify(model).train()
    with pytest.raises(wina.UsageError, match=r"model\.eval\(\)"):
        calibrate()
    model.eval()
    calibrate()


def test_unknown_settings_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="tokns"):
        wina.calibrate(model, make_tokenizer(), tokns=512)
