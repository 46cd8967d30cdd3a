import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import wina
from tests.helpers import make_plan
from wina.kernels import available_backends
from wina.layers import sparse_layers

needs_kernels = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the compiled CPU kernels were not built"
)


def prefill_and_step(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(9)[None] + 5
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        return model(torch.tensor([[7]]), past_key_values=cache).logits


@needs_kernels
def test_input_major_weights_give_the_same_function(each_model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in each_model.state_dict().items()}
    strides = {name: value.stride() for name, value in each_model.named_parameters()}
    wina.sparsify(each_model, make_plan(each_model, 0.5), check=False)
    wanted = prefill_and_step(each_model)
    wina.lay_out_for_decode(each_model)
    for _, layer in sparse_layers(each_model):
        matrix = layer.weight.t() if "Conv1D" in type(layer).__name__ else layer.weight
        assert matrix.stride(0) == 1
    torch.testing.assert_close(prefill_and_step(each_model), wanted, atol=1e-4, rtol=1e-4)
    assert type(each_model.get_output_embeddings()) is not nn.Linear
    wina.densify(each_model)
    assert type(each_model.get_output_embeddings()) is nn.Linear
    assert strides == {name: value.stride() for name, value in each_model.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in each_model.state_dict().items())


@needs_kernels
def test_input_major_models_save_and_load(model: PreTrainedModel, tmp_path: object) -> None:
    wina.sparsify(model, make_plan(model, 0.5), check=False)
    wanted = prefill_and_step(model)
    wina.lay_out_for_decode(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(prefill_and_step(again), wanted, atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_no_second_copy_of_the_weights_beyond_one_layer() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "startup.py"
    done = subprocess.run(
        [sys.executable, str(script), "--config", "smollm2-135m"],
        # Every matrix gets memory of its own, so that what is freed is given back at once.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout)
    sparse = found["weights_gib"] - 576 * 49_152 * 2 / 2**30
    slack = 0.01  # of 0.2 GiB
    for name in ("identify", "sparsify", "lay out", "densify"):
        assert found["steps"][name]["peak_gib"] < found["largest_linear_gib"] + slack < sparse / 10
