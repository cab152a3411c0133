"""From final states to logits, and to the loss without ever having all of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 26  # beyond, the loss takes them in parts


class Head(nn.Linear):
    """One linear map for each depth: the codes of each are words of their own."""

    def __init__(self, dim: int, codebook_size: int, depth: int = 1) -> None:
        super().__init__(dim, depth * codebook_size, bias=False)
        self.codebook_size, self.depth = codebook_size, depth

    def forward(self, states: Tensor) -> Tensor:
        """States (B, n, dim) from which all tokens of whole cells are predicted -> (B, n, K)."""
        parts = zip(self._split(states), self._weights(), strict=True)
        return self._join([F.linear(*part) for part in parts])

    def at(self, depth: int, states: Tensor) -> Tensor:
        """States (..., dim) from which tokens of this depth are predicted -> (..., K)."""
        return F.linear(states, self._weights()[depth])

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, (B, n), float32, of targets (B, n) under `forward`'s logits.

        A large one is taken in parts, so that the logits never stand whole.
        """
        parts = zip(self._split(states), self._weights(), self._split(targets), strict=True)
        return self._join([_loss(*part) for part in parts])

    def _weights(self) -> tuple[Tensor, ...]:
        """Of each depth, (K, dim)."""
        return (self.weight,) if self.depth == 1 else self.weight.chunk(self.depth)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, n, ...) -> of each depth (B, n / depth, ...)."""
        return (x,) if self.depth == 1 else x.unflatten(1, (-1, self.depth)).unbind(2)

    def _join(self, parts: list[Tensor]) -> Tensor:
        """The other way round."""
        return parts[0] if self.depth == 1 else torch.stack(parts, dim=2).flatten(1, 2)


def _loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (B, t) from states (B, t, dim), one depth's weight, and targets (B, t)."""

    def nats(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, weight).float(), targets, reduction="none")

    states, cells = states.flatten(0, 1), targets.flatten()
    parts = math.ceil(len(states) * len(weight) / LOGITS_AT_ONCE)
    if parts <= 1:
        return nats(states, cells).view(targets.shape)
    # The backward pass makes the logits of each part anew.
    losses = [
        checkpoint(nats, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(states.chunk(parts), cells.chunk(parts), strict=True)
    ]
    return torch.cat(losses).view(targets.shape)
