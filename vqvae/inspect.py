"""What the codebook of a tokenizer learned."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.model import VQVAE

TILES = 5  # latent positions on a side of the grid from whose middle a code's picture is taken


@torch.no_grad()
def inspect_codebook(
    model: VQVAE, counts: Tensor, max_projected: int = 4096, max_decoded: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """A codebook, learned or implicit, from the most to the least used code.

    Returns the fraction of each code, (K,), by counts as `Quantizer.count` orders them; the first
    codes on their two first principal components (PCA), (max_projected, 2); what the first decode
    to among their like, (max_decoded, C, f, f) in [-1, 1].
    """
    usage, order = (counts / counts.sum()).sort(descending=True, stable=True)
    codes = model.quantizer.codes(order[:max_projected])
    training, f = model.training, model.config.downsampling
    # Alone, in a grid of 1x1, a code would lose to GroupNorm what it shows.
    height, width = (min(side, TILES) for side in model.config.latent_dim)
    grids = codes[:max_decoded, :, None, None].expand(-1, -1, height, width)
    decoded = torch.cat([model.eval().decoder(grid) for grid in grids.split(64)]).clamp(-1, 1)
    model.train(training)
    top, left = height // 2 * f, width // 2 * f
    middle = decoded[:, :, top : top + f, left : left + f]
    return usage, principal_components(codes), middle


def principal_components(vectors: Tensor) -> Tensor:
    """Vectors (n, D) -> their two first principal components, (n, 2), on the CPU.

    The sign of each axis is fixed, so that pictures of different steps compare.
    """
    vectors = vectors.double().cpu()
    vectors = vectors - vectors.mean(dim=0)
    axes = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -2:].flip(1)  # (D, 2)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    projected = (vectors @ (axes * largest.sign())).float()
    return F.pad(projected, (0, 2 - projected.shape[1]))  # where D is 1
