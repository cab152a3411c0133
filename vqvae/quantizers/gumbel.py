"""`gumbel`: the encoder names its code, and is taught by relaxed samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vqvae.quantizers.contract import Quantizer
from vqvae.quantizers.entropy import entropy

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig


class GumbelQuantizer(Quantizer):
    """Scores of all codes for each vector; in training a sample of them (arXiv 1611.01144).

    The decoder always sees one whole code. The gradient is that of the softmax of the scores and
    the same noise (straight-through Gumbel-softmax, section 2.2). The entropy term is the
    divergence of the scores from uniform, in nats, which keeps codes in play
    (arXiv 2102.12092, section 2.1). N x K scores are made: for codebooks of moderate size.
    """

    ENTROPY_WEIGHT = 5e-4
    TEMPERATURE = 1.0

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.proj = nn.Linear(config.codebook_dim, config.codebook_size)
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight, std=config.codebook_dim**-0.5)

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> the codes of highest score (N,)."""
        return self.proj(vectors).argmax(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D)."""
        return self.embedding.weight[indices]

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), losses."""
        logits = self.proj(vectors)  # (N, K)
        noisy = logits
        if self.training:
            noisy = logits - torch.empty_like(logits).exponential_().log()
        indices = noisy.argmax(dim=1)
        soft = (noisy / self.TEMPERATURE).softmax(dim=1) @ self.embedding.weight.detach()
        # The chosen code learns by itself; the scores by how the softened code would move.
        z_q = self.lookup(indices) + (soft - soft.detach())
        uncertainty, _ = entropy(logits)
        divergence = math.log(self.config.codebook_size) - uncertainty
        return z_q, indices, {"entropy": self.config.entropy_weight * divergence}
