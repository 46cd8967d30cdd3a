"""How far 4-bit weights move a task's score: the embedded model, and the same quantized once more.

The embedded weights are 4-bit ones already (Q4_1), and the 16-bit ones are not at hand. Quantizing
them again on another grid of the same kind (Q4_0) adds an error about as large as the first, and
so shows what such an error does to a score.

    python benchmarks/quantization_noise.py --task-data data --tasks piqa
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor, nn

from wina.evaluation.tasks import check_tasks, evaluate_tasks, fill_differences
from wina.models import load_model

BLOCK = 32  # weights that share a scale


def again(weight: Tensor, form: str) -> Tensor:
    """Return a weight (out, in) quantized and back, float32."""
    kind = GGMLQuantizationType[form.upper()]
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def relative_step(weight: Tensor) -> float:
    """Return the rms error of rounding to Q4_1's own steps, over the rms of the weights."""
    blocks = weight.reshape(-1, BLOCK)
    steps = (blocks.amax(1) - blocks.amin(1)) / 15
    return float((steps.square().mean() / 12 / weight.square().mean()).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--tasks", default="piqa")
    parser.add_argument("--form", default="q4_0", help="of the second quantization")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    tasks = check_tasks(options.tasks.split(","), options.task_data)

    plain = load_model(None, dtype="float32")
    first, second, steps = [], [], []
    changed = copy.deepcopy(plain.model)
    with torch.no_grad():
        for module in changed.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                weight = module.weight.float()
                found = again(weight, options.form)
                first.append(float(weight.square().sum()))
                second.append(float((found - weight).square().sum()))
                steps.append(relative_step(weight))
                module.weight.copy_(found)
    noise = (sum(second) / sum(first)) ** 0.5
    print(f"relative error: Q4_1 about {sum(steps) / len(steps):.3f}, {options.form} {noise:.3f}")
    scores = [
        evaluate_tasks(
            model.to(getattr(torch, options.dtype)), plain.tokenizer, [], tasks, name="demo",
            batch_size=8,
        ).dense
        for model in (plain.model, changed)
    ]  # fmt: skip
    for task, score in scores[1].tasks.items():
        fill_differences(score, scores[0].tasks[task])
        for name, metric in score.metrics.items():
            facts = metric.model_dump(exclude={"questions"})
            print(task, name, scores[0].tasks[task].metrics[name].value, json.dumps(facts))


if __name__ == "__main__":
    main()
