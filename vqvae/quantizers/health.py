"""Where codes start, and where they are put when they die: the same in every process."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from vqvae.quantizers.search import nearest_codes

KMEANS_STEPS = 10
DECAY = 0.99  # of moving averages over batches


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; each has equally many."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def generator(draws: Tensor) -> torch.Generator:
    """Random numbers that depend on how often was drawn before, and on nothing else.

    So all processes draw the same, and a resumed training what the uninterrupted one would have.
    """
    made = torch.Generator().manual_seed(int(draws))
    draws.add_(1)
    return made


def kmeans(vectors: Tensor, size: int, draws: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
    """`size` centres of the vectors (N, D) of all processes, (size, D).

    Args:
        vectors: this process's part.
        size: number of centres.
        draws: the counter for `generator`.
        place: puts a mean where centres live, as on the unit sphere.
    """
    vectors = gather(vectors)
    order = torch.randperm(max(len(vectors), size), generator=generator(draws))
    centres = vectors[order[:size].to(vectors.device) % len(vectors)].clone()
    for _ in range(KMEANS_STEPS):
        nearest = nearest_codes(vectors, centres)
        counts = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        occupied = counts > 0  # a centre that nobody chose stays where it is
        centres[occupied] = place(sums[occupied] / counts[occupied, None])
    return centres


def follow(share: Tensor, indices: Tensor, revive_below: float) -> Tensor:
    """The numbers of the codes that are dead, (n,).

    Args:
        share: of each code in the assignments, (K,); the moving average that takes in `indices`.
        indices: which code each vector of this process chose, (N,).
        revive_below: a code is dead whose share is less than this of 1/K.
    """
    counts = total(torch.bincount(indices, minlength=len(share)).float())
    share.lerp_(counts / counts.sum(), 1 - DECAY)
    return (share < revive_below / len(share)).nonzero().flatten()


def badly_represented(vectors: Tensor, errors: Tensor, number: int, draws: Tensor) -> Tensor:
    """`number` of the vectors (N, D) of all processes, drawn in proportion to `errors` (N,).

    With squared errors this is how k-means++ draws its centres.
    """
    # If the batch is not finite there is no worst vector; the guard of the training reports it.
    weights = gather(errors).cpu().double().nan_to_num(0, 0) + 1e-12
    chosen = torch.multinomial(weights, number, replacement=True, generator=generator(draws))
    return gather(vectors)[chosen.to(vectors.device)]
