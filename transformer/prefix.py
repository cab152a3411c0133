"""The prefix of a sequence: the class, and the indices of another grid, the condition.

The prefix is (B,) where a model takes only a class, else (B, 1 + hc * wc): the class, then the
condition in raster order (arXiv 2012.09841, section 3.2).
"""

import torch
from torch import Tensor

from transformer.config import GPTConfig


def make_prefix(classes: Tensor, conditions: Tensor | None = None) -> Tensor:
    """Classes (B,) and conditions (B, hc, wc), of any integer type -> the prefix, int64."""
    if conditions is None:
        return classes
    return torch.cat([classes[:, None], conditions.flatten(1).to(classes)], dim=1)


def null_prefix(prefix: Tensor, config: GPTConfig) -> Tensor:
    """A prefix of the same shape without class and condition."""
    null = torch.full_like(prefix, config.no_condition)
    null.view(len(null), -1)[:, 0] = config.no_class
    return null


def drop_conditioning(
    prefix: Tensor, config: GPTConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Drop the class of some images and the condition of some, for guidance (arXiv 2207.12598).

    The fractions are `class_dropout` and `condition_dropout`. Both are dropped together in half of
    the smaller fraction, so that each is also dropped alone, all of it often enough to be learned.
    If the two fractions less that overlap sum to more than 1, no image keeps both, and the overlap
    is their excess over 1.

    Args:
        prefix: (B,) or (B, P).
        config: of the model.
        generator: of the random numbers, on the CPU.
    """
    chance = torch.rand(len(prefix), generator=generator).to(prefix.device)
    together = min(config.class_dropout, config.condition_dropout) / 2
    dropped = (chance - config.class_dropout + together) % 1 < config.condition_dropout
    dropped = dropped[:, None].repeat(1, config.prefix_length)
    dropped[:, 0] = chance < config.class_dropout
    return torch.where(dropped.view_as(prefix), null_prefix(prefix, config), prefix)
