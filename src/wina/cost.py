"""What a decoded token costs, from a model's config alone: multiply-adds and bytes of weights.

Counted are the linears of the blocks, the output head, the gate of each linear and the rotation of
each input basis. Not counted are embeddings, norms, biases and attention over the cache: small, or
not a matter of weights. Two totals stand side by side:

- the papers' convention (arXiv 2505.19427, table 5): blocks x (1 - s) + head, in "FLOPs" that are
  multiply-adds;
- the true one, which pays for what a method adds to the linears. A basis costs a square matrix for
  each group of linears that shares an input: two a block for the paper's transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from wina.criteria.wina_kgate import KINDS_WITH_NORMS
from wina.errors import UsageError
from wina.layers import SparsityCounter
from wina.layers.quantized import stored
from wina.models import Site, find_sites, skeleton
from wina.plan import Plan
from wina.selection import check_sparsity

THRESHOLD_BYTES = 4  # thresholds are float32
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class Part:
    """A part of a token's cost."""

    multiply_adds: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)

    def times(self, share: float) -> Part:
        """Return a share of it."""
        return Part(self.multiply_adds * share, self.bytes * share)


@dataclass(frozen=True)
class TokenCost:
    """Parts of the cost of one decoded token, at one sparsity.

    Attributes:
        blocks: the dense blocks' linears; of experts those that a token is routed to.
        head: the dense output head.
        sparsity: the share of ``blocks`` that is not touched.
        gating: one operation for each input channel of a linear, and its float32 threshold.
        rotation: of the input bases; zero without.
        free: part of the sparse blocks that is exactly zero, columns of a leader's W Q beyond its
            rank (k_proj with grouped-query attention). A top-k plan that picks them need not read
            them. It is not taken off any total, since with thresholds these columns are the
            first ones to be dropped and already part of the sparsity.
    """

    blocks: Part
    head: Part
    sparsity: float
    gating: Part
    rotation: Part
    free: Part

    @property
    def dense(self) -> Part:
        """The dense model's token."""
        return self.blocks + self.head

    @property
    def paper(self) -> Part:
        """By the papers' convention: what the linears themselves still cost."""
        return self.blocks.times(1 - self.sparsity) + self.head

    @property
    def true(self) -> Part:
        """With everything that the method adds."""
        return self.paper + self.gating + self.rotation

    def saved(self, total: Part) -> float:
        """Return the share of the dense token's multiply-adds that a total saves."""
        return 1 - total.multiply_adds / self.dense.multiply_adds

    def record(self) -> dict[str, Any]:
        """Return all parts and totals as JSON values."""
        parts = {name: value for name, value in asdict(self).items() if name != "sparsity"}
        return {
            "sparsity": self.sparsity,
            "parts": parts,
            "dense": asdict(self.dense),
            "paper": {**asdict(self.paper), "saved": self.saved(self.paper)},
            "true": {
                **asdict(self.true),
                "saved": self.saved(self.true),
                "bytes_saved": 1 - self.true.bytes / self.dense.bytes,
            },
        }


def token_cost(
    config: Any, sparsity: float, *, basis: str | None = None, bytes_per_weight: float = 2.0
) -> TokenCost:
    """Return what a decoded token costs a model, from its config; no weight is loaded.

    Args:
        config: of a Transformers model.
        sparsity: share of the blocks' weights not touched, in [0, 1).
        basis: the input basis that the linears which share an input with k or gate run in; with
            svd the leaders have zero columns.
        bytes_per_weight: 2 for 16-bit weights.

    Raises:
        UsageError: a bad sparsity, or an architecture that cannot be counted.
    """
    check_sparsity(sparsity)
    model = skeleton(config)
    sites = find_sites(model)

    def weights(count: float) -> Part:
        return Part(count, count * bytes_per_weight)

    leaders = [
        site for site in sites if basis and site.kind in KINDS_WITH_NORMS and site.expert is None
    ]
    usage = _usage(sites, config)
    channels = sum(site.in_features * usage(site) for site in sites)
    return TokenCost(
        blocks=weights(sum(site.weights * usage(site) for site in sites)),
        head=weights(_head_weights(model)),
        sparsity=sparsity,
        gating=Part(channels, channels * THRESHOLD_BYTES) if sparsity else Part(),
        rotation=weights(sum(site.in_features**2 for site in leaders)),
        free=weights(sum(_free(site, sparsity) for site in leaders if basis == "svd")),
    )


def token_bytes(
    model: PreTrainedModel, plan: Plan, counter: SparsityCounter
) -> tuple[float, float]:
    """Return the bytes that a decoded token reads under a plan, and those of the dense model.

    Counted are the planned linears, the output head and all that the plan adds. Weights that
    another library quantized count as the kernels would read them, codes, scales and zero points.

    Args:
        model: the plan's.
        plan: the plan.
        counter: of a run of the plan, with ``read_weights``.
    """
    width = model.dtype.itemsize
    head: Any = None if plan.document.include_head else model.get_output_embeddings()
    other = 0.0 if head is None else _weight_bytes(head, head.weight.numel(), width)
    dense = other
    modules = dict(model.named_modules())
    for name, linear in plan.document.linears.items():
        dense += _weight_bytes(modules.get(name), linear.cost, width)
    return counter.bytes_read(width) + other + extra_bytes(plan, width), dense


def _weight_bytes(module: nn.Module | None, weights: float, width: int) -> float:
    # A fused expert is a module of its own only while it is looked into; its weight is of floats.
    found = None if module is None else stored(module)
    return weights * width if found is None else found.bytes_read()


def extra_bytes(plan: Plan, width: int) -> float:
    """Return the bytes that a plan reads for a token beside the linears' weights.

    Thresholds or scales are float32; a rotation, a low-rank term and a tuned bias have the
    weights' width.

    Args:
        plan: the plan.
        width: bytes of a weight.
    """
    gates = 4 * sum(vector.numel() for vector in plan.vectors.values())
    gates += width * sum(bias.numel() for bias in plan.biases.values())
    for name, part in plan.parts.items():
        if name.endswith(".output_thresholds"):
            gates += 4 * part.numel()
        elif not name.endswith(".basis_scale"):  # it is multiplied into the rotation
            gates += width * part.numel()
    return gates


def _head_weights(model: nn.Module) -> int:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return 0 if head is None else int(head.get_parameter("weight").numel())


def _free(site: Site, sparsity: float) -> float:
    """Return the zero weights among those that top-k keeps, if it takes live columns first."""
    kept = site.in_features * (1 - sparsity)
    return max(0.0, kept - min(site.in_features, site.out_features)) * site.out_features


def _usage(sites: Sequence[Site], config: Any) -> Callable[[Site], float]:
    """Return what gives the share of tokens that go through a linear: less than 1 for experts."""
    number = max((site.expert + 1 for site in sites if site.expert is not None), default=0)
    text = config.get_text_config()
    chosen = next((getattr(text, name) for name in CHOSEN if getattr(text, name, None)), None)
    if number and chosen is None:
        raise UsageError(f"cannot tell how many experts a token of {text.model_type!r} is sent to")
    return lambda site: 1.0 if site.expert is None else (chosen or 0) / number
