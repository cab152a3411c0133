"""`gumbel`: the encoder names its code, and is taught by relaxed samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vqvae.quantizers import health
from vqvae.quantizers.contract import Quantizer
from vqvae.quantizers.entropy import entropy
from vqvae.quantizers.search import lowest

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig


class GumbelQuantizer(Quantizer):
    """Scores of all codes for each vector; in training a sample of them (arXiv 1611.01144).

    The decoder always sees one whole code. The gradient is that of the softmax of the scores and
    the same noise (straight-through Gumbel-softmax, section 2.2). The entropy term is the
    divergence of the scores from uniform, in nats, which keeps codes in play
    (arXiv 2102.12092, section 2.1). Training makes N x K scores: for codebooks of moderate size.

    Codes and encodings live in different spaces, so that there is no start from the data. A code
    that hardly ever scores highest splits one that often does: both take its code and its scores,
    less the logarithm of their number. So the decoder sees what it saw, until they learn apart.
    """

    ENTROPY_WEIGHT = 5e-4
    IDLE = ("commitment_cost",)
    CURE = "use a higher --entropy_weight, or a smaller --codebook_size or --learning_rate"
    TEMPERATURE = 1.0

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.proj = nn.Linear(config.codebook_dim, config.codebook_size)
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight, std=config.codebook_dim**-0.5)
        self.register_buffer("share", torch.full((config.codebook_size,), 1 / config.codebook_size))
        self.register_buffer("draws", torch.tensor(0))

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> the codes of highest score (N,)."""
        return lowest(vectors, self.proj.weight, -self.proj.bias)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D)."""
        return self.embedding.weight[indices]

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), losses."""
        if not torch.is_grad_enabled() and not self.training:
            indices = self.assign(vectors)  # without N x K scores
            return self.lookup(indices), indices, {}
        if self.training and self.config.revive_below > 0:
            self._revive(vectors.detach())
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

    @torch.compiler.disable
    @torch.no_grad()
    def _revive(self, vectors: Tensor) -> None:
        """Follow which codes score highest on vectors (N, D), and let the dead split others."""
        dead = health.follow(self.share, self.assign(vectors), self.config.revive_below)
        if len(dead) == 0:
            return
        weights = self.share.index_fill(0, dead, 0.0).cpu().double() + 1e-12
        generator = health.generator(self.draws)
        chosen = torch.multinomial(weights, len(dead), replacement=True, generator=generator)
        parents = chosen.to(dead.device)
        families = torch.bincount(parents, minlength=len(self.share)) + 1.0
        self.proj.bias -= families.log()
        self.share /= families
        for numbers in (self.proj.weight, self.proj.bias, self.embedding.weight, self.share):
            numbers[dead] = numbers[parents]
