"""`ibq`: every code learns from every vector, through the softmax of their products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.quantizers.codebook import VectorQuantizer
from vqvae.quantizers.entropy import entropy
from vqvae.quantizers.search import largest_products


class IndexBackpropagationQuantizer(VectorQuantizer):
    """Index backpropagation (arXiv 2412.02692, section 3.2): argmax forward, softmax backward.

    The code of a vector is that of largest inner product. All codes get a gradient in every step;
    they start and are revived as those of `vq`. Training makes N x K scores.
    """

    ENTROPY_WEIGHT = 0.2  # 0.05 in the paper, with batches that show most codes at once
    ENTROPY_TEMPERATURE = 0.01  # section 4.1 of the paper
    GRADIENTS = ("straight_through",)

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,)."""
        return largest_products(vectors, self.codebook)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), losses."""
        indices = self.choose(vectors.detach())
        z_q = codes = self.lookup(indices)
        scored = torch.is_grad_enabled()  # else nobody needs the N x K scores
        if scored:
            logits = vectors @ self.codebook.T
            soft = logits.softmax(dim=1) @ self.codebook.detach()
            z_q = codes + (soft - soft.detach())  # one-hot + softmax - its value, times the codes
        losses = {
            # Double quantization loss, equation 5: also through the indices. Beta lies on the
            # encoder's term, as everywhere here. The paper's weight of 1 there and a term of beta
            # for the chosen code alone were tried on MNIST: no better at this entropy weight, and
            # at the paper's most codes died.
            "codebook": F.mse_loss(z_q, vectors),
            "commitment": self.config.commitment_cost * F.mse_loss(vectors, codes.detach()),
        }
        if self.config.entropy_weight > 0 and scored:
            one, all_of_them = entropy(logits / self.ENTROPY_TEMPERATURE)
            losses["entropy"] = self.config.entropy_weight * (one - all_of_them)
        return z_q, indices, losses
