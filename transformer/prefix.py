"""What a GPT is given before the grid: the class, and the indices of another grid, the condition.

The prefix is (B,) where there is no condition, else (B, 1 + hc*wc): the class token, and the
condition's cells in raster order (arXiv 2012.09841, section 3.2). Both have words of their own,
and each has one more for "not known".
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
    """A prefix like this one that says nothing: neither class nor condition."""
    blank = torch.full_like(prefix, config.no_condition)
    blank.view(len(blank), -1)[:, 0] = config.no_class
    return blank


def drop_conditioning(
    prefix: Tensor, config: GPTConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Hide the class of some images and the condition of some, for guidance (arXiv 2207.12598).

    Their shares are `class_dropout` and `condition_dropout`. Both are hidden together in half of
    the smaller share, so that each is also hidden alone, all of it often enough to be learned.
    If the two shares less that overlap sum to more than 1, no image shows both, and the overlap is
    what they have in excess of 1.
    """
    chance = torch.rand(len(prefix), generator=generator).to(prefix.device)
    together = min(config.class_dropout, config.condition_dropout) / 2
    hidden = (chance - config.class_dropout + together) % 1 < config.condition_dropout
    hidden = hidden[:, None].repeat(1, config.prefix_length)
    hidden[:, 0] = chance < config.class_dropout
    return torch.where(hidden.view_as(prefix), null_prefix(prefix, config), prefix)
