"""Codebooks: vectors to the indices of their nearest codes, and back.

A quantizer is a module made from
`(codebook_size, codebook_dim, *, commitment_cost, revive_below)` with

    forward(z_e)   (B, D, h, w) -> Quantized
    nearest(z_e)   (B, D, h, w) -> indices (B, h, w)
    embed(indices) (B, h, w)    -> z_q (B, D, h, w), exactly what the decoder saw

and a line in `QUANTIZERS`. All arithmetic is done in float32, also under autocast.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Distances are made in chunks of at most this many numbers (64 MiB in float32).
CHUNK = 1 << 24


class Quantized(NamedTuple):
    """What a quantizer makes of an encoding z_e.

    Attributes:
        z_q: (B, D, h, w), the codes' vectors; the gradient goes straight through to z_e.
        indices: (B, h, w), int64 in [0, codebook_size).
        losses: scalars that the training loss adds up as they are, by name.
    """

    z_q: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest row of `codebook` (K, D) for each of `vectors` (N, D), as (N,).

    The N x K distances only ever exist in chunks, so memory does not grow with N * K.
    Ties go to the lowest index.
    """
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, where |v|^2 does not change which code is nearest.
    half_norms = codebook.square().sum(dim=1) / 2
    rows = max(1, CHUNK // len(codebook))
    return torch.cat(
        [
            torch.addmm(half_norms, chunk, codebook.T, alpha=-1).argmin(dim=1)
            for chunk in vectors.split(rows)
        ]
    )


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q, bit for bit, with the gradient of z_e (arXiv 1711.00937, section 3.2)."""
    return z_q.detach() + (z_e - z_e.detach())


class VectorQuantizer(nn.Module):
    """The codebook of VQ-VAE, learned by gradient (arXiv 1711.00937, equation 3).

    The codes start as the k-means centres of the first batch it is trained on. A code whose
    share of the assignments (a moving average) falls below `revive_below / codebook_size` is
    dead: it is put where the current batch is represented worst.
    """

    DECAY = 0.99  # of the moving average of each code's share
    KMEANS_STEPS = 10

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        commitment_cost: float = 0.25,
        revive_below: float = 0.03,
    ) -> None:
        super().__init__()
        self.commitment_cost = commitment_cost
        self.revive_below = revive_below
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.normal_(self.embedding.weight, std=codebook_dim**-0.5)
        self.register_buffer("share", torch.full((codebook_size,), 1 / codebook_size))
        self.register_buffer("initialised", torch.tensor(False))

    def place(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D) as they are compared: here, as they are."""
        return vectors

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) as they are compared and decoded."""
        return self.place(self.embedding.weight.float())

    def nearest(self, z_e: Tensor) -> Tensor:
        """Encodings (B, D, h, w) -> indices (B, h, w)."""
        batch, _, height, width = z_e.shape
        with torch.autocast(z_e.device.type, enabled=False):
            vectors = self.place(z_e.float().permute(0, 2, 3, 1).flatten(0, 2))
            return nearest_codes(vectors, self.codebook).view(batch, height, width)

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> z_q (B, D, h, w)."""
        return self.codebook[indices].permute(0, 3, 1, 2).contiguous()

    def forward(self, z_e: Tensor) -> Quantized:
        batch, _, height, width = z_e.shape
        with torch.autocast(z_e.device.type, enabled=False):
            vectors = self.place(z_e.float().permute(0, 2, 3, 1).flatten(0, 2))  # (B*h*w, D)
            if self.training and not self.initialised:
                self._initialise(vectors.detach())
            indices = nearest_codes(vectors.detach(), self.codebook.detach())
            if self.training and self.revive_below > 0 and self._revive(vectors.detach(), indices):
                indices = nearest_codes(vectors.detach(), self.codebook.detach())
            codes = self.codebook[indices]  # (B*h*w, D)
            losses = {
                "codebook": F.mse_loss(codes, vectors.detach()),
                # beta belongs to this term, which moves the encoder (equation 3).
                "commitment": self.commitment_cost * F.mse_loss(vectors, codes.detach()),
            }
            z_q = straight_through(vectors, codes)
        z_q = z_q.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
        return Quantized(z_q, indices.view(batch, height, width), losses)

    @torch.no_grad()
    def _initialise(self, vectors: Tensor) -> None:
        """Put the codes on the k-means centres of `vectors` (N, D), of every process the same."""
        size = self.embedding.num_embeddings
        order = torch.randperm(max(len(vectors), size), device=vectors.device)
        centres = vectors[order[:size] % len(vectors)].clone()
        for _ in range(self.KMEANS_STEPS):
            nearest = nearest_codes(vectors, centres)
            counts = torch.bincount(nearest, minlength=size)
            sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
            occupied = counts > 0  # a centre that nobody chose stays where it is
            centres[occupied] = self.place(sums[occupied] / counts[occupied, None])
        if dist.is_initialized():
            dist.broadcast(centres, 0)
        self.embedding.weight.copy_(centres)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _revive(self, vectors: Tensor, indices: Tensor) -> bool:
        """Follow each code's share; move the dead to badly represented vectors. Were there any?"""
        size = self.embedding.num_embeddings
        counts = torch.bincount(indices, minlength=size).float()
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.share.lerp_(counts / counts.sum(), 1 - self.DECAY)
        dead = (self.share < self.revive_below / size).nonzero().flatten()
        if len(dead) == 0:
            return False
        # A vector is drawn in proportion to its squared error, as k-means++ draws its centres.
        errors = (vectors - self.codebook[indices]).square().sum(dim=1) + 1e-12
        chosen = vectors[torch.multinomial(errors, len(dead), replacement=True)]
        if dist.is_initialized():
            dist.broadcast(chosen, 0)
        self.embedding.weight[dead] = chosen
        self.share[dead] = 1 / size
        return True


class CosineQuantizer(VectorQuantizer):
    """Codes and encodings on the unit sphere, compared by angle (arXiv 2110.04627, section 3.2).

    With few dimensions (8, say) nearly every code is used.
    """

    def place(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D) as they are compared: at unit length."""
        return F.normalize(vectors, dim=-1)


QUANTIZERS = {"vq": VectorQuantizer, "cosine": CosineQuantizer}
