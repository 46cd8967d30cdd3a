"""A look at each linear's inputs on a little calibration text, one linear at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wina.layers import opened
from wina.layers.linear import matrix
from wina.methods.base import Setting
from wina.methods.recipe import search_ids
from wina.models import run_body
from wina.selection import channels_kept, topk_mask
from wina.statistics import LinearStatistics

T = TypeVar("T")
TOKENS = 256


@torch.no_grad()
def for_each_linear(
    setting: Setting, see: Callable[[LinearStatistics, Tensor, Tensor], T]
) -> dict[str, T]:
    """Return what ``see`` makes of each linear's statistics, inputs x and weight W, by name.

    x has shape (tokens, in_features), float32; positions of the dense prefix are left out. Linears
    that the text does not reach (experts) are left out.
    """
    skip = setting.calibration.document.dense_prefix
    found: dict[str, T] = {}
    ids = search_ids(setting, skip + TOKENS)[:1]

    def hook(linear: LinearStatistics) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            if linear.site.expert is None:
                x = x[skip:]
            found[linear.site.name] = see(linear, x, matrix(module).detach().float())

        return look

    with opened(setting.model):
        handles = [
            setting.model.get_submodule(linear.site.name).register_forward_pre_hook(hook(linear))
            for linear in setting.calibration.linears(include_head=False)
        ]
        try:
            run_body(setting.model, ids)
        finally:
            for handle in handles:
                handle.remove()
    return found


def dropped_by_topk(x: Tensor, scale: Tensor, sparsity: float) -> Tensor:
    """Return x with all but the channels that top-k keeps, the rest zero: what is dropped."""
    mask = topk_mask(x, scale.to(x.device), channels_kept(x.shape[-1], sparsity))
    return torch.where(mask, 0, x)
