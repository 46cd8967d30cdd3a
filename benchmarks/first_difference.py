"""Where greedy text of the kernels leaves that of the reference kernels, and at which channel.

Both decode the embedded model under its plan, uncompiled, on one device. For each token that
follows, every linear's mask is compared; where the first one differs, the channel is printed with
how far it lies from its threshold and how far rounding moved it. In 16 bits both are also compared
with the reference kernels in float32 on the same weights and tokens: whose roundings are larger.

    python benchmarks/first_difference.py --tokens 20
    python benchmarks/first_difference.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import wina.plan
from wina.api import sparsify
from wina.generation import Decoder
from wina.kernels import use_backend
from wina.layers import lay_out_for_decode
from wina.layers.linear import SparseLayer, sparse_layers
from wina.models.loading import load_model
from wina.plan import Plan

SHIPPED = Path(wina.plan.__file__).parent / "shipped" / "smollm2-135m-instruct" / "50"
Step = tuple[int, Tensor, dict[str, Tensor]]  # token, logits, each linear's input


def decode(
    model: nn.Module, prompt: Tensor, tokens: int, backend: str, forced: list[Step] | None = None
) -> list[Step]:
    """Decode greedily, or the tokens of ``forced``."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].reshape(-1, args[0].shape[-1])[-1].clone()

        return hook

    handles = [m.register_forward_pre_hook(keep(name)) for name, m in sparse_layers(model)]
    with use_backend(backend), torch.no_grad():
        decoder = Decoder(model, prompt.shape[1] + tokens, mode="eager")
        decoder.prefill(prompt)
        steps = [(int(decoder.token), decoder.logits.clone(), {})]
        for place in range(tokens - 1):
            if forced is not None:
                decoder.token.fill_(forced[place][0])
            inputs.clear()
            decoder.step()
            steps.append((int(decoder.token), decoder.logits.clone(), dict(inputs)))
    for handle in handles:
        handle.remove()
    return steps


def error(x: Tensor, exact: Tensor) -> str:
    off = (x.double() - exact.double()).abs()
    return f"{float(off.square().mean().sqrt()):.1e} (at most {float(off.max()):.1e})"


def flips(
    layers: list[tuple[str, SparseLayer]], ours: Step, theirs: Step, exact: Step
) -> list[str]:
    lines = []
    for name, layer in layers:
        if name not in ours[2]:
            continue
        x, y, t = ours[2][name], theirs[2][name], layer.vector
        for j in ((x.abs() >= t) != (y.abs() >= t)).nonzero().flatten().tolist():
            lines.append(
                f"{name}, channel {j}, threshold {float(t[j]):.9g}: |x| - t is "
                f"{float(x[j].abs() - t[j]):+.2e} here and {float(y[j].abs() - t[j]):+.2e} in the "
                f"reference; the linear's inputs differ by up to {float((x - y).abs().max()):.1e} "
                f"(from float32's by {error(x, exact[2][name])} here, "
                f"{error(y, exact[2][name])} in the reference)"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=512, help="random tokens before them")
    parser.add_argument("--model", help="a file of the embedded model's, if it is not installed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model = load_model(options.model, dtype=options.dtype, device=options.device).model
    sparsify(model, Plan.load(SHIPPED))
    lay_out_for_decode(model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, options.prompt), generator=generator)
    theirs = decode(model, prompt, options.tokens, "reference")
    ours = decode(model, prompt, options.tokens, options.device)
    exact = theirs
    if options.dtype != "float32":
        exact = decode(model.float(), prompt, options.tokens, "reference", theirs)
    layers = list(sparse_layers(model))
    for place, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True), 1):
        found = flips(layers, a, b, c)
        difference = float((a[1] - b[1]).abs().max())
        print(
            f"token {place}: logits differ by {difference:.1e} (from float32's by "
            f"{error(a[1], c[1])} here, {error(b[1], c[1])} in the reference), "
            f"masks in {len(found)} channels"
        )
        if found:
            print("first:", found[0])
        if a[0] != b[0]:
            gap = float(b[1].max() - b[1][0, a[0]])
            print(f"the token differs: its logit is {gap:.3f} below the reference's first")
        if found or a[0] != b[0]:
            return


if __name__ == "__main__":
    main()
