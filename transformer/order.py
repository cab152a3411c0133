"""Orders other than row by row, in which a GPT may learn first (RAR, arXiv 2411.00776).

An order is a permutation of the cells; the prefix comes first in all of them, and the tokens of
a cell stay together.
"""

import torch
from torch import Tensor


def random_order_probability(anneal: tuple[float, float], progress: float) -> float:
    """Probability of a random order after a share `progress` of the training (section 3.2).

    1 up to the first number of `anneal`, 0 from the second on, linear in between.
    """
    start, end = anneal
    if progress < start:
        return 1.0
    return max(0.0, (end - progress) / (end - start)) if end > start else 0.0


def sample_permutations(
    indices: Tensor, share: float, generator: torch.Generator | None = None
) -> Tensor:
    """Orders (B, h*w) for indices (B, h, w[, depth]): random in a `share` of them."""
    count, cells = len(indices), indices.shape[1] * indices.shape[2]
    shuffled = torch.rand(count, cells, generator=generator).argsort(dim=1)
    orders = torch.where(
        torch.rand(count, 1, generator=generator) < share, shuffled, torch.arange(cells)
    )
    return orders.to(indices.device)


def token_order(order: Tensor, depth: int) -> Tensor:
    """The order of cells (B, cells) as one of tokens (B, cells * depth)."""
    return (order[:, :, None] * depth + torch.arange(depth, device=order.device)).flatten(1)
