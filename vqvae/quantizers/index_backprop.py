"""`ibq`: every code learns from every vector, through the softmax of their products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.quantizers.contract import Quantizer
from vqvae.quantizers.entropy import entropy
from vqvae.quantizers.search import largest_products

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig


class IndexBackpropagationQuantizer(Quantizer):
    """Index backpropagation (arXiv 2412.02692, section 3.2): argmax forward, softmax backward.

    The code of a vector is that of largest inner product. All codes get a gradient in every step,
    so that none dies and none need be revived. N x K scores are made in training.
    """

    ENTROPY_WEIGHT = 0.2  # 0.05 in the paper, with batches that show most codes at once
    ENTROPY_TEMPERATURE = 0.01  # section 4.1 of the paper

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight, std=config.codebook_dim**-0.5)

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,)."""
        return largest_products(vectors, self.embedding.weight)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D)."""
        return self.embedding.weight[indices]

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), losses."""
        indices = self.assign(vectors.detach())
        codes = self.lookup(indices)
        logits = vectors @ self.embedding.weight.T  # (N, K)
        soft = logits.softmax(dim=1) @ self.embedding.weight.detach()
        z_q = codes + (soft - soft.detach())  # one-hot + softmax - its value, times the codes
        losses = {
            # Double quantization loss, equation 5: also through the indices.
            "codebook": F.mse_loss(z_q, vectors),
            "commitment": self.config.commitment_cost * F.mse_loss(vectors, codes.detach()),
        }
        if self.config.entropy_weight > 0:
            one, all_of_them = entropy(logits / self.ENTROPY_TEMPERATURE)
            losses["entropy"] = self.config.entropy_weight * (one - all_of_them)
        return z_q, indices, losses
