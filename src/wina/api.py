"""The Python interface: calibrate, plan, sparsify, densify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina import layers
from wina.calibration import Calibration, CalibrationSettings, FileText, TextSource
from wina.calibration import calibrate as run_calibration
from wina.errors import UsageError
from wina.integrations import hf
from wina.layers.linear import read_by_others
from wina.layers.quantized import read
from wina.models import check_bare, family_of, identify, settle
from wina.plan import Plan
from wina.progress import note
from wina.selection import is_runnable

Model = TypeVar("Model", bound=PreTrainedModel)


def calibrate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    text: TextSource | str | Path | Sequence[str | Path] | None = None,
    *,
    output: str | Path | None = None,
    name: str | None = None,
    **settings: int | bool,
) -> Calibration:
    """Collect the statistics from which plans for any target sparsity are made.

    Args:
        model: a dense causal language model.
        tokenizer: its tokenizer.
        text: UTF-8 text files or a TextSource; None is what the
            model writes itself and docstrings of Python's library.
        output: folder to write; interrupted work there is taken up again.
        name: of the model, for records.
        settings: fields of CalibrationSettings: tokens, context, dense_prefix, seed, ...

    Raises:
        UsageError: unsupported architecture or settings.
        WinaError: too little text, or activations that are not finite.
    """
    if isinstance(text, (str, Path)):
        text = [text]
    if isinstance(text, Sequence):
        text = FileText(tuple(Path(path) for path in text))
    options = CalibrationSettings(**settings)  # type: ignore[arg-type]
    return run_calibration(model, tokenizer, text, options, output=output, name=name)


def sparsify(model: Model, plan: Plan, *, check: bool = True) -> Model:
    """Make a model sparse, in place, and return it.

    Prompts stay dense and decoding becomes sparse, unless the plan says otherwise.

    Args:
        model: the model that the plan was made for.
        plan: what to drop.
        check: hash the model's weights and refuse a plan made for others (about a second for
            each gigabyte). Names and shapes are always checked.

    Raises:
        UsageError: the plan's selection is for scoring alone, or adapters are around the model.
        WinaError: the plan was made for another model; nothing is changed then.
    """
    if not is_runnable(plan.document.selection):
        raise UsageError(
            f"selection {plan.document.selection!r} is for comparing methods: it costs more than "
            "it saves. Score its plans with wina reproduce."
        )
    check_bare(model)
    settle(model)
    if check:
        plan.document.model.check(identify(model, model.config.name_or_path))
    family_of(model)  # knows the classes of its linears from here on
    layers.sparsify(model, plan)
    hf.attach(model, plan.document)
    masked = sorted(plan.vectors.keys() & set(read_by_others(model)))
    if masked and read(model.get_submodule(masked[0])) is None:
        note(
            f"another library keeps the weights of {len(masked)} linears, such as {masked[0]}: "
            "their inputs are masked, which shows the quality and saves no time"
        )
    return model


def densify(model: Model) -> Model:
    """Restore a sparse model to exactly what it was, in place, and return it.

    A PEFT model's adapters stay where they are, around a dense base.
    """
    layers.densify(model)
    base = getattr(model, "get_base_model", None)  # PEFT's
    hf.detach(base() if callable(base) else model)
    return model
