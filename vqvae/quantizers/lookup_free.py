"""`lfq`: every dimension is one bit of the index; no codebook to learn."""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.quantizers.contract import Quantizer
from vqvae.quantizers.entropy import entropy
from vqvae.quantizers.estimators import straight_through

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig

MOST_BITS = 24  # of an index: every code is counted


class LookupFreeQuantizer(Quantizer):
    """Lookup-free quantization (arXiv 2310.05737, section 3): codes are the corners of [-1, 1]^D.

    Bit i of the index tells whether dimension i is above 0. The entropy term makes each bit sure
    of itself and all combinations of bits common. Combinations are taken over groups of bits, as
    many as needed for 2^GROUP of them at most: exact up to K = 2^GROUP, beyond it an upper bound
    on the mean's entropy (arXiv 2409.04410, section 3.1).
    """

    ENTROPY_WEIGHT = 0.1
    IDLE = ("revive_below",)
    CURE = "use a higher --entropy_weight, or a smaller --codebook_size or --learning_rate"
    GROUP = 9  # bits
    SOFTNESS = 1.0  # of the assignment of a vector to corners by squared distance

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.register_buffer("bits", 2 ** torch.arange(config.codebook_dim), persistent=False)

    @classmethod
    def settle(cls, config: QuantizerConfig) -> dict[str, object]:
        """The dimension from the codebook size, a power of two."""
        dim = config.codebook_dim or 9
        if dim > MOST_BITS:
            raise ValueError(f"lfq can have a codebook_dim of at most {MOST_BITS}, got {dim}")
        size = config.codebook_size or 2**dim
        bits = round(log2(size))
        if size != 2**bits:
            raise ValueError(f"lfq needs a codebook_size that is a power of two, got {size}")
        return {"codebook_size": size, "codebook_dim": bits, "depth": 1}

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,)."""
        return ((vectors > 0) * self.bits).sum(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D) of -1 and 1."""
        return torch.where((indices[:, None] & self.bits) > 0, 1.0, -1.0)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), losses."""
        indices = self.assign(vectors)
        codes = self.lookup(indices)
        losses = {"commitment": self.config.commitment_cost * F.mse_loss(vectors, codes)}
        if self.config.entropy_weight > 0:
            losses["entropy"] = self.config.entropy_weight * self.entropy_loss(vectors)
        return straight_through(vectors, codes), indices, losses

    def entropy_loss(self, vectors: Tensor) -> Tensor:
        """Mean entropy of one vector's assignment less the entropy of the mean, in nats."""
        loss = vectors.new_zeros(())
        for group in vectors.split(self.GROUP, dim=1):
            bits = torch.arange(group.shape[1], device=group.device)
            corners = torch.arange(2 ** len(bits), device=group.device)[:, None] >> bits & 1
            # -|v - c|^2 is 2 v.c and what is the same for all corners.
            one, all_of_them = entropy(2 / self.SOFTNESS * group @ (2.0 * corners - 1).T)
            loss = loss + one - all_of_them
        return loss
