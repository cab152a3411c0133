"""Grids of which some cells are given: the rest drawn around them."""

from typing import Any

import torch
from torch import Tensor

from transformer.gpt import GPT
from transformer.sampling import generate


def later_known_mask(keep: Tensor) -> Tensor:
    """The given cells that come after a drawn one, (h, w), bool: no draw before sees them."""
    drawn_before = (~keep).flatten().cumsum(dim=0).view(keep.shape) > 0
    return keep & drawn_before


def complete(
    model: GPT,
    prefix: Tensor,
    given: Tensor,
    keep: Tensor,
    *,
    candidates: int = 1,
    **options: Any,
) -> Tensor:
    """Draw the cells that are not kept.

    A raster order draws a cell without sight of the given cells behind it. So several candidates
    are drawn, and that one is taken whose drawn cells make the given cells behind them most
    likely, by the log-probabilities that the model has for them on the way, without guidance and
    params: the mode of self-normalised importance sampling, with the draws as proposals.

    Args:
        model: in eval mode.
        prefix: (N,) class of each image, or `model.config.no_class`; or (N, p), see `make_prefix`.
        given: (N, h, w) or (N, h, w, depth), the indices; of the cells that are drawn any.
        keep: (h, w), bool, the cells that stay.
        candidates: draws for each image; of no use where all given cells come first.
        options: see `generate`.

    Returns:
        Like `given`, int64, on the CPU.
    """
    candidates = candidates if later_known_mask(keep).any() else 1
    prefixes, grids = (x.repeat_interleave(candidates, dim=0) for x in (prefix, given))
    scores = torch.zeros(len(prefixes))
    drawn = generate(
        *(model, prefixes),
        given=grids,
        keep=keep,
        size=tuple(keep.shape),
        scores=scores,
        **options,
    )
    best = scores.view(-1, candidates).argmax(dim=1)
    return drawn[best + torch.arange(len(prefix)) * candidates]
