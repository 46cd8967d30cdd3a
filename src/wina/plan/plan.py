"""The plan's schema, its folder, and its checks.

A folder holds ``plan.json`` (this module's PlanDocument), ``plan.safetensors`` (one float32
vector for each linear) and a model card. Nothing of the base model's weights is in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from wina.errors import WinaError
from wina.files import (
    check_replaceable,
    read_json,
    read_tensors,
    replacing_folder,
    write_tensors,
    write_text,
)
from wina.plan.card import model_card
from wina.plan.extras import Extras
from wina.plan.identity import ModelIdentity
from wina.selection import Selection

SCHEMA_VERSION: Literal[1, 2] = 1  # 2 with extras, so that what cannot run them refuses
DOCUMENT, VECTORS, CARD = "plan.json", "plan.safetensors", "README.md"
BIAS = ".bias"  # after a linear's name in the file


class PlannedLinear(BaseModel):
    """What a plan says of one linear.

    Attributes:
        kind: the projection's own name, such as ``k_proj``.
        block: index of its decoder block; None outside the blocks (lm_head).
        sparsity: the share of input channels this linear is expected to drop.
        keep: channels kept of each token; only with top-k selection.
        bias: whether a bias is added to its output on sparse positions (tuned plans).
        usage: share of tokens that go through it: 1, or less for a linear of an expert.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    block: int | None
    in_features: int = Field(gt=0)
    out_features: int = Field(gt=0)
    sparsity: float = Field(ge=0, le=1)
    keep: int | None = Field(default=None, ge=0)
    bias: bool = False
    usage: float = Field(default=1.0, ge=0, le=1)

    @property
    def cost(self) -> float:
        """Weights that a decoded token reads of it on average, if it drops nothing."""
        return self.in_features * self.out_features * self.usage


class PlanDocument(BaseModel):
    """Everything of a plan but its vectors.

    Attributes:
        target_sparsity: the share of the planned linears' weights asked to stay untouched.
        realized_sparsity: that share measured on held-out text; None if it was not measured.
        prefill: whether positions of the prompt are sparse too.
        dense_prefix: with sparse prefill, the number of first positions that stay dense.
        versions: of the packages that made the plan.
        extras: what the plan holds beside thresholds; only in schema version 2.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    model: ModelIdentity
    method: str
    allocation: str
    selection: Selection
    target_sparsity: float = Field(ge=0, lt=1)
    realized_sparsity: float | None = Field(default=None, ge=0, le=1)
    include_head: bool = False
    prefill: Literal["dense", "sparse"] = "dense"
    dense_prefix: int = Field(default=0, ge=0)
    linears: dict[str, PlannedLinear] = Field(min_length=1)
    calibration: dict[str, str | int | float | bool | None] = {}
    versions: dict[str, str] = {}
    extras: Extras | None = None


@dataclass(frozen=True)
class Plan:
    """A document and one float32 vector of shape (in_features,) for each of its linears.

    The vector holds the thresholds t_j with threshold selection, and the scales s_j with top-k.
    ``biases`` holds, for linears that have one, the float32 vector of shape (out_features,) that
    is added to the output on sparse positions. ``parts`` holds the tensors of the extras.
    """

    document: PlanDocument
    vectors: dict[str, Tensor]
    biases: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        linears = self.document.linears
        if missing := sorted(linears.keys() ^ self.vectors.keys()):
            raise WinaError(f"the plan's vectors and its document disagree on {missing[0]}")
        for name, linear in linears.items():
            vector = self.vectors[name]
            if vector.shape != (linear.in_features,) or vector.dtype != torch.float32:
                raise WinaError(
                    f"the plan's vector for {name} is {tuple(vector.shape)} {vector.dtype}, "
                    f"not ({linear.in_features},) float32"
                )
            if bool((vector < 0).any() | vector.isnan().any()):
                raise WinaError(f"the plan's vector for {name} holds negative numbers or NaN")
            if linear.bias != (name in self.biases):
                raise WinaError(f"the plan's biases and its document disagree on {name}")
            if linear.bias and self.biases[name].shape != (linear.out_features,):
                raise WinaError(f"the plan's bias for {name} has a wrong shape")
            if (linear.keep is None) != (self.document.selection == "threshold"):
                raise WinaError(f"the plan's 'keep' for {name} does not fit its selection")
            if linear.keep is not None and linear.keep > linear.in_features:
                raise WinaError(f"the plan keeps more channels of {name} than it has")
        extras = self.document.extras
        if (extras is None) != (self.document.schema_version == 1):
            raise WinaError("plans of schema version 2, and no others, hold extras")
        shapes = {} if extras is None else extras.shapes(linears)
        if wrong := sorted(shapes.keys() ^ self.parts.keys()):
            raise WinaError(f"the plan's extras and its document disagree on {wrong[0]}")
        for name, shape in shapes.items():
            part = self.parts[name]
            if part.shape != shape or part.dtype != torch.float32:
                raise WinaError(f"the plan's {name} is not {shape} float32")

    @property
    def sparsity(self) -> float:
        """The expected share of the planned linears' weights that a decoded token skips."""
        linears = self.document.linears.values()
        return sum(x.sparsity * x.cost for x in linears) / sum(x.cost for x in linears)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides what a model computes under the plan."""
        document = self.document
        facts = [document.selection, document.prefill, document.dense_prefix, document.extras]
        digest = hashlib.sha256(repr(facts).encode())
        for tensors in (self.vectors, self.biases, self.parts):
            for name, tensor in sorted(tensors.items()):
                keep = document.linears[name].keep if name in document.linears else None
                digest.update(f"{name} {keep} {tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write the plan's folder, whole or not at all, and return its path."""
        path = Path(folder)
        check_replaceable(path, DOCUMENT)
        with replacing_folder(path) as temporary:
            biases = {f"{name}{BIAS}": bias for name, bias in self.biases.items()}
            tensors = {**self.vectors, **biases, **self.parts}
            write_tensors(temporary / VECTORS, tensors, {"format": "pt"})
            write_text(temporary / DOCUMENT, self.document.model_dump_json(indent=1))
            write_text(temporary / CARD, model_card(self.document, self.sparsity))
        return path

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> Plan:
        """Read a plan from a folder or, if there is no such folder, from the Hugging Face hub.

        Raises:
            WinaError: the folder or repository is missing, incomplete or damaged.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(str(source), revision)
        document = read_json(folder / DOCUMENT, PlanDocument)
        tensors, _ = read_tensors(folder / VECTORS)
        biases = {
            name: tensors.pop(f"{name}{BIAS}")
            for name, linear in document.linears.items()
            if linear.bias and f"{name}{BIAS}" in tensors
        }
        extras = document.extras
        names = [] if extras is None else extras.shapes(document.linears)
        parts = {name: tensors.pop(name) for name in names if name in tensors}
        return cls(document, tensors, biases, parts)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the plan as a model repository of its own and return its address."""
        import tempfile

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            folder = self.save(Path(parent) / "plan")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def _download(repo_id: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[DOCUMENT, VECTORS])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WinaError(
            f"there is no plan at {repo_id!r}: no such folder, and the hub did not give it "
            f"({type(error).__name__}). Make one with `wina plan`."
        ) from error
