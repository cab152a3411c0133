"""The nearest code of each vector, in memory that does not grow with vectors x codes."""

import torch
from torch import Tensor

# Scores are made in chunks of at most this many numbers (64 MiB in float32).
CHUNK = 1 << 24


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest row of `codebook` (K, D) for each of `vectors` (N, D), as (N,).

    Ties go to the lowest index.
    """
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, where |v|^2 does not change which code is nearest.
    return lowest(vectors, codebook, codebook.square().sum(dim=1) / 2)


def largest_products(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The row of `codebook` (K, D) of largest inner product with each of `vectors` (N, D): (N,)."""
    return lowest(vectors, codebook, codebook.new_zeros(len(codebook)))


def lowest(vectors: Tensor, codebook: Tensor, offsets: Tensor) -> Tensor:
    """argmin over k of offsets[k] - v . codebook[k] for each vector v of (N, D), as (N,).

    Args:
        vectors: (N, D).
        codebook: (K, D).
        offsets: (K,).
    """
    rows = max(1, CHUNK // len(codebook))
    return torch.cat(
        [
            torch.addmm(offsets, chunk, codebook.T, alpha=-1).argmin(dim=1)
            for chunk in vectors.split(rows)
        ]
    )
