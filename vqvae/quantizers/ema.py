"""`ema`: codes as moving averages of the vectors that chose them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqvae.quantizers import health
from vqvae.quantizers.codebook import VectorQuantizer

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig

FADED = 1e-5  # of a vector


class EMAQuantizer(VectorQuantizer):
    """A codebook without a gradient: online k-means (arXiv 1711.00937, appendix A.1).

    A batch moves the codes just before the next one is quantized, so that codes and indices of
    a batch belong together for as long as anybody looks at them.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("counts", torch.ones(config.codebook_size))
        self.register_buffer("sums", self.embedding.weight.detach().clone())

    def losses(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """The encoder's terms: the codes learn by themselves."""
        losses = super().losses(vectors, codes)
        del losses["codebook"]
        return losses

    @torch.compiler.disable
    @torch.no_grad()
    def choose(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,); in training the codes follow, a batch behind."""
        if not self.training:
            return super().choose(vectors)
        alive = self.counts > FADED  # the averages of the others say nothing any more
        self.embedding.weight[alive] = self.sums[alive] / self.counts[alive, None]
        indices = super().choose(vectors)
        counts = torch.bincount(indices, minlength=len(self.counts)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        # A code that is not chosen keeps its place, while both of its averages fade.
        self.counts.lerp_(health.total(counts), 1 - health.DECAY)
        self.sums.lerp_(health.total(sums), 1 - health.DECAY)
        return indices

    def move(self, codes: Tensor, vectors: Tensor) -> None:
        """Put the codes of the given numbers (n,) on vectors (n, D), as if one had chosen each."""
        super().move(codes, vectors)
        self.sums[codes] = vectors
        self.counts[codes] = 1.0
