"""How often each codebook index occurs in sets of grids."""

import math

import torch
from torch import Tensor

from utils.evaluation.bootstrap import POSITIVE, SHARE, Figure, figure


def frequencies(grids: Tensor, codebook_size: int, depth: int, weights: Tensor) -> Tensor:
    """The share of each index in each resample: (R, codebook_size * depth), float64.

    Args:
        grids: (N, h, w), or (N, h, w, depth), of which each depth has indices of its own.
        codebook_size: K.
        depth: indices a cell.
        weights: of `bootstrap.resample`, (R, N).
    """
    grids = grids.long().cpu()
    if depth > 1:
        grids = grids + codebook_size * torch.arange(depth)
    flat = grids.flatten(1)
    share = [
        torch.bincount(
            flat.flatten(),
            weights=weight.double().repeat_interleave(flat.shape[1]),
            minlength=codebook_size * depth,
        )
        for weight in weights.cpu()
    ]
    return torch.stack(share) / flat.numel()


def _entropy(shares: Tensor) -> Tensor:
    """Of each row, in bits."""
    return -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(2)


def health(shares: Tensor, tokens_per_pixel: float) -> dict[str, Figure]:
    """Usage in percent, perplexity, and bits per pixel of an ideal code of each index by itself.

    Args:
        shares: of `frequencies`, (R, codes).
        tokens_per_pixel: indices of a grid over pixels of an image.
    """
    bits = _entropy(shares)
    return {
        "codebook_usage": figure(100 * (shares > 0).double().mean(dim=1), (0.0, 100.0)),
        "perplexity": figure(2**bits, (1.0, float(shares.shape[1]))),
        "entropy_per_pixel": figure(bits * tokens_per_pixel, POSITIVE),
    }


def divergence(shares: Tensor, others: Tensor) -> Figure:
    """Jensen-Shannon divergence in bits, from 0 for equal frequencies to 1 for disjoint ones."""
    middle = _entropy((shares + others) / 2)
    return figure(middle - (_entropy(shares) + _entropy(others)) / 2, SHARE)
