"""Codebooks that are learned by gradient: `vq` and `cosine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.quantizers import health
from vqvae.quantizers.contract import Quantizer
from vqvae.quantizers.entropy import codebook_entropy_loss
from vqvae.quantizers.estimators import GRADIENTS
from vqvae.quantizers.search import nearest_codes

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig


class VectorQuantizer(Quantizer):
    """The codebook of VQ-VAE, learned by gradient (arXiv 1711.00937, equation 3).

    The codes start as the k-means centres of the first batch it is trained on. A code whose
    share of the assignments (a moving average) falls below `revive_below / codebook_size` is
    dead: it is put where the current batch is represented worst. Both give in several processes
    what one gives on their joined batch.
    """

    ENTROPY_WEIGHT = 0.0
    GRADIENTS = tuple(GRADIENTS)
    CURE = (
        "use --reset_codebook_on_collapse, a higher --revive_below or --entropy_weight, or a "
        "smaller --codebook_size or --learning_rate"
    )
    RESTARTS = True

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        size, dim = config.codebook_size, config.codebook_dim
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.register_buffer("share", torch.full((size,), 1 / size))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("draws", torch.tensor(0))

    def place(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D) as they are compared: here, as they are."""
        return vectors

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) as they are compared and decoded."""
        return self.place(self.embedding.weight.float())

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,)."""
        return nearest_codes(self.place(vectors), self.codebook)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D)."""
        return self.codebook[indices]

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), losses."""
        indices = self.choose(vectors.detach())
        vectors, codes = self.place(vectors), self.lookup(indices)
        z_q = GRADIENTS[self.config.gradient](vectors, codes)
        return z_q, indices, self.losses(vectors, codes)

    def losses(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """What is learned from placed vectors and their codes, (N, D) each."""
        losses = {
            "codebook": F.mse_loss(codes, vectors.detach()),
            # beta belongs to this term, which moves the encoder (equation 3).
            "commitment": self.config.commitment_cost * F.mse_loss(vectors, codes.detach()),
        }
        if self.config.entropy_weight > 0:
            entropy_loss = codebook_entropy_loss(vectors, self.codebook)
            losses["entropy"] = self.config.entropy_weight * entropy_loss
        return losses

    @torch.compiler.disable
    @torch.no_grad()
    def choose(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,); in training also sees to the health of the codes."""
        if not self.training:
            return self.assign(vectors)
        if not self.initialised:
            size = self.config.codebook_size
            centres = health.kmeans(self.place(vectors), size, self.draws, self.place)
            self.move(torch.arange(size, device=vectors.device), centres)
            self.initialised.fill_(True)
        indices = self.assign(vectors)
        if self.config.revive_below > 0 and self._revive(self.place(vectors), indices):
            indices = self.assign(vectors)
        return indices

    def restart(self) -> None:
        """Let the codes start anew from the next batch."""
        self.initialised.fill_(False)
        self.share.fill_(1 / self.config.codebook_size)

    def move(self, codes: Tensor, vectors: Tensor) -> None:
        """Put the codes of the given numbers (n,) on vectors (n, D)."""
        self.embedding.weight[codes] = vectors

    def _revive(self, vectors: Tensor, indices: Tensor) -> bool:
        """Follow each code's share; move the dead to badly represented vectors. Were there any?"""
        dead = health.follow(self.share, indices, self.config.revive_below)
        if len(dead) == 0:
            return False
        errors = (vectors - self.lookup(indices)).square().sum(dim=1)
        self.move(dead, health.badly_represented(vectors, errors, len(dead), self.draws))
        self.share[dead] = 1 / self.config.codebook_size
        return True


class CosineQuantizer(VectorQuantizer):
    """Codes and encodings on the unit sphere, compared by angle (arXiv 2110.04627, section 3.2).

    With few dimensions (8, say) nearly every code is used.
    """

    def place(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D) as they are compared: at unit length."""
        return F.normalize(vectors, dim=-1)
