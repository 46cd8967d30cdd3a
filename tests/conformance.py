"""The whole way for one family: calibrate, plan, sparsify, generate, save, load, densify, eval.

Run by tests/models/test_conformance.py, and by benchmarks/support_table.py, which writes what it
returns into docs/architectures.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import wina
from tests.families import EXPERTS, Case, make
from tests.helpers import make_plan, prompt
from wina.calibration.rotated import find_bases, in_bases
from wina.evaluation import evaluate
from wina.generation import generate
from wina.layers import phase_of
from wina.layers.experts import is_experts
from wina.methods import Setting
from wina.methods.recipe import recipe
from wina.models import input_groups

NEW_TOKENS = 6


@dataclass(frozen=True)
class Outcome:
    """What came of a family; ``refusal`` is empty if everything worked."""

    case: Case
    linears: int = 0
    kinds: tuple[str, ...] = ()
    sparsity: float = 0.0
    refusal: str = ""
    groups: tuple[str, ...] = ()  # kinds that lead a group of linears rotated to an input basis


def go_through(case: Case, tokenizer: PreTrainedTokenizerBase, text: Path, folder: Path) -> Outcome:
    """Take the whole way, asserting at every step; a refusal is an outcome, anything else fails."""
    model = make(case)
    ids = prompt(10)
    untouched = copy.deepcopy(model)
    dense = model(ids).logits
    settings: dict[str, Any] = {"tokens": 768, "context": 128, "dense_prefix": 4}
    try:
        calibration = wina.calibrate(model, tokenizer, text, verdict=False, **settings)
    except wina.UsageError as error:
        return Outcome(case, refusal=str(error))
    calibration.save(folder / "calibration")
    calibration = wina.Calibration.load(folder / "calibration")
    plan = calibration.plan(0.5, "wina", "global", model=model, refine=True)
    assert plan.document.realized_sparsity is not None
    assert abs(plan.document.realized_sparsity - 0.5) < 0.02
    assert abs(calibration.plan(0.1, "teal", "greedy", model=model).sparsity - 0.1) < 0.01
    plan.save(folder / "plan")
    plan = wina.Plan.load(folder / "plan")

    wina.sparsify(model, make_plan(model, 0.0, prefill="sparse"), check=False)
    assert torch.equal(model(ids).logits, dense), "0 % is not the dense model"
    wina.densify(model)
    wina.sparsify(model, plan)
    with masked(untouched, plan) as decoding:
        wanted = decode(untouched, ids, decoding)
    found = decode(model, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[1:], decode(untouched, ids)[1:], rtol=1e-2, atol=1e-2)
    tokens = wanted.argmax(-1).tolist()
    assert continue_text(model, ids) == tokens
    assert generate(model, ids[0].tolist(), NEW_TOKENS).ids == tokens

    model.save_pretrained(folder / "sparse")
    loaded = case.auto.from_pretrained(folder / "sparse", dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in untouched.named_parameters()
    }
    assert continue_text(loaded, ids) == tokens
    for sparse in (model, loaded):
        wina.densify(sparse)
        assert phase_of(sparse) is None
        weights = dict(untouched.named_parameters())
        assert all(torch.equal(p, weights[name]) for name, p in sparse.named_parameters())
        assert sparse.state_dict().keys() == untouched.state_dict().keys()
        assert [*map(type, sparse.modules())] == [*map(type, untouched.modules())]
    assert torch.equal(model(ids).logits, dense)
    # Weights that lie elsewhere in memory may be summed in another order, sparse or not.
    torch.testing.assert_close(loaded(ids).logits, dense, rtol=1e-5, atol=1e-5)

    scored = {"name": case.name, "tokens": 256, "context": 128, "dense_prefix": 4}
    result = evaluate(model, tokenizer, [plan], [text], **scored).results[0]
    assert abs(result.sparsity - 0.5) < 0.1
    assert 0 < result.kl < float("inf")
    groups = rotate(model, untouched, calibration, ids, folder)
    kinds = tuple(dict.fromkeys(linear.kind for linear in plan.document.linears.values()))
    assert result.by_kind.keys() == set(kinds)
    assert any(x.usage < 1 for x in plan.document.linears.values()) == (case in EXPERTS)
    return Outcome(case, len(plan.document.linears), kinds, result.sparsity, groups=groups)


def rotate(
    model: PreTrainedModel,
    untouched: PreTrainedModel,
    calibration: wina.Calibration,
    ids: Tensor,
    folder: Path,
) -> tuple[str, ...]:
    """Plan in input bases where there is a k or gate to take them from; return those kinds."""
    if not input_groups(model):
        return ()
    dense = model(ids).logits
    with in_bases(model, find_bases(model, "svd")):
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-3, atol=1e-3)
    plan = recipe("wina", "uniform", "threshold", "svd")(Setting(model, calibration), 0.5)
    assert torch.equal(model(ids).logits, dense)
    plan.save(folder / "rotated")
    plan = wina.Plan.load(folder / "rotated")
    wina.sparsify(model, plan)
    with masked(untouched, plan) as decoding:
        wanted = decode(untouched, ids, decoding)
    torch.testing.assert_close(decode(model, ids), wanted, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(wanted[1:], decode(untouched, ids)[1:], rtol=0.1, atol=0.1)
    wina.densify(model)
    assert torch.equal(model(ids).logits, dense)
    assert plan.document.extras is not None
    leaders = (plan.document.linears[name].kind for name in plan.document.extras.bases)
    return tuple(dict.fromkeys(leaders))


def continue_text(model: PreTrainedModel, ids: Tensor) -> list[int]:
    # MPT's own setting is no cache; every step is then a longer prompt, and prompts are dense.
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 1}
    found = model.generate(ids, use_cache=True, **settings)
    return found[0, ids.shape[1] :].tolist()


@torch.no_grad()
def decode(
    model: PreTrainedModel, ids: Tensor, decoding: Callable[[bool], None] = lambda _: None
) -> Tensor:
    """Greedy decoding step by step; ``decoding`` is told what follows. Logits of each step."""
    decoding(False)
    step = model(ids, use_cache=True)
    logits = [step.logits[0, -1]]
    decoding(True)
    while len(logits) < NEW_TOKENS:
        token = logits[-1].argmax()[None, None]
        step = model(token, past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits[0, -1])
    return torch.stack(logits)


@contextmanager
def masked(dense: PreTrainedModel, plan: wina.Plan) -> Iterator[Callable[[bool], None]]:
    """Mask the inputs of a dense model's linears by plain hooks, while it is told so.

    In an input basis, the mask is on Q^T (x / d), and what is left is brought back.
    """
    state = {"on": False}
    bases = plan.document.extras.bases if plan.document.extras else {}
    leaders = {name: leader for leader, basis in bases.items() for name in basis.linears}

    def hook(name: str, thresholds: Tensor) -> Callable[..., Any]:
        def mask(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0]
            if not state["on"]:
                return args
            if name not in leaders:
                return (x * (x.abs() >= thresholds),)
            q = plan.parts[f"{leaders[name]}.basis"]
            d = plan.parts[f"{leaders[name]}.basis_scale"]
            z = (x / d) @ q
            return ((z * (z.abs() >= thresholds)) @ q.T * d,)

        return mask

    modules = dict(dense.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(hook(name, thresholds))
        for name, thresholds in plan.vectors.items()
        if name in modules
    ]
    plain = {name: type(module).forward for name, module in modules.items() if is_experts(module)}
    for name in plain:
        modules[name].forward = partial(through_experts, modules[name], plan, name, state)
    try:
        yield lambda on: state.update(on=on)
    finally:
        for handle in handles:
            handle.remove()
        for name in plain:
            del modules[name].forward


def through_experts(
    experts: nn.Module,
    plan: wina.Plan,
    name: str,
    state: dict[str, bool],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Every token through every expert, masked, one number at a time: slow, and plain."""
    into = "gate_up_proj"
    out = torch.zeros_like(hidden)
    for token, x in enumerate(hidden):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            y = x
            for projection in (into, "down_proj"):
                if state["on"]:
                    y = y * (y.abs() >= plan.vectors[f"{name}.{expert}.{projection}"])
                matrix = getattr(experts, projection)[expert]
                y = y @ matrix if experts.is_transposed else matrix @ y
                if experts.has_bias:
                    y = y + getattr(experts, f"{projection}_bias")[expert]
                if projection == into:
                    y = experts._apply_gate(y[None])[0]
            out[token] += weight * y
    return out
