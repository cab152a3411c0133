"""`fsq`: every dimension rounded to one of a few levels; no codebook to learn."""

from __future__ import annotations

from math import log2, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqvae.quantizers.contract import Quantizer
from vqvae.quantizers.estimators import straight_through

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig


def levels_for(codebook_size: int) -> tuple[int, ...]:
    """Levels of 8 and 4 whose product is a power of two from 16 on.

    Raises:
        ValueError: it is none.
    """
    bits = round(log2(codebook_size))
    if codebook_size != 2**bits or bits < 4:
        raise ValueError(
            f"fsq has no levels for codebook_size {codebook_size}; use a power of two from 16 "
            "on, or say the levels of each dimension, as levels 8,5,5,5"
        )
    fours = -bits % 3  # 3 bits a dimension, or 2 bits in as many dimensions as that is over
    return (8,) * ((bits - 2 * fours) // 3) + (4,) * fours


MOST_LEVELS = 24  # dimensions; the product of more is above what is allowed


class FiniteScalarQuantizer(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505, section 3.1): codes are a grid in [-1, 1]^D.

    Dimension i takes `levels[i]` values; the codebook is all of their combinations, index 0 the
    lowest value everywhere, and the first dimension counts fastest.
    """

    IDLE = ("commitment_cost", "revive_below")
    MARGIN = 1e-3  # puts the outermost levels within reach of the tanh

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", levels.cumprod(0) // levels, persistent=False)

    @classmethod
    def settle(cls, config: QuantizerConfig) -> dict[str, object]:
        """Levels from the codebook size or the other way round, and the dimension from both."""
        levels = config.levels or levels_for(config.codebook_size or 512)
        if len(levels) > MOST_LEVELS:
            raise ValueError(f"levels must be {MOST_LEVELS} at most, got {len(levels)}")
        if min(levels) < 2:
            raise ValueError(f"levels must be at least 2 each, got {levels}")
        return {
            "levels": levels,
            "codebook_size": prod(levels),
            "codebook_dim": len(levels),
            "depth": 1,
        }

    def steps(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> the same squeezed to about [0, levels - 1], to be rounded there."""
        spread = (self.levels - 1) * (1 + self.MARGIN) / 2
        # With an even number of levels 0 falls on the lower of the two in the middle.
        middle = (self.levels // 2).float()
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (vectors + (offset / spread).atanh()).tanh() * spread - offset + middle

    def whole(self, steps: Tensor) -> Tensor:
        """Steps (N, D) -> the nearest whole ones."""
        return steps.round().clamp(min=0).minimum(self.levels - 1)

    def values(self, steps: Tensor) -> Tensor:
        """Whole steps (N, D) from 0 to levels - 1 -> codes (N, D) in [-1, 1]."""
        return (steps - self.levels // 2) / (self.levels // 2)

    def index(self, steps: Tensor) -> Tensor:
        """Whole steps (N, D) -> indices (N,)."""
        return (steps.long() * self.strides).sum(dim=1)

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,)."""
        return self.index(self.whole(self.steps(vectors)))

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D)."""
        return self.values(indices[:, None] // self.strides % self.levels)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), no losses."""
        steps = self.steps(vectors)
        rounded = self.whole(steps.detach())
        return straight_through(self.values(steps), self.values(rounded)), self.index(rounded), {}
