"""What a tokenizer makes of images, and what has become of its codes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vqvae.model import VQVAE


class Reconstructed(NamedTuple):
    """What a tokenizer made of images.

    Attributes:
        sums: over all images: what was measured, and each of the quantizer's losses.
        counts: how often each code was chosen, as `Quantizer.count` has it.
        originals, images: the first (n, C, H, W), and what was made of them, in [-1, 1].
    """

    sums: dict[str, Tensor]
    counts: Tensor
    originals: Tensor
    images: Tensor


@torch.no_grad()
def reconstruct(
    model: VQVAE,
    batches: Iterable[Tensor],
    measure: Callable[[Tensor, Tensor], dict[str, Tensor]],
    *,
    keep: int,
    weight: float = 1.0,
) -> Reconstructed:
    """Send images through a tokenizer and back.

    Args:
        model: is in eval mode meanwhile.
        batches: of images (B, C, H, W) in [-1, 1]; at least one.
        measure: makes numbers by name, means over a batch, of its images and what was made of them.
        keep: how many of the first to give back.
        weight: 0 where the batches are not to count.
    """
    training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    counts, kept = 0, []
    for images in batches:
        made, quantized = model(images)
        made = made.float().clamp(-1, 1)
        values = measure(images, made)
        values |= {f"{name}_loss": value for name, value in quantized.losses.items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * (weight * len(images))
        counts = counts + weight * model.quantizer.count(quantized.indices)
        if sum(len(pair[0]) for pair in kept) < keep:
            kept.append((images.cpu(), made.cpu()))
    model.train(training)
    originals, remade = (torch.cat(part)[:keep] for part in zip(*kept, strict=True))
    return Reconstructed(sums, counts, originals, remade)


class Codes(NamedTuple):
    """Codes from the most to the least used.

    Attributes:
        shares: of all choices, (K,), falling.
        places: of the first n in the plane in which they vary most (PCA), (n, 2).
        images: what the decoder makes of a single cell of each of the first m, (m, C, f, f).
    """

    shares: Tensor
    places: Tensor
    images: Tensor


@torch.no_grad()
def look_at_codes(model: VQVAE, counts: Tensor, points: int = 4096, alone: int = 256) -> Codes:
    """A look at a codebook, learned or implied.

    Args:
        model: whose decoder is in eval mode meanwhile.
        counts: how often each code was chosen, as `Quantizer.count` has it.
        points, alone: how many codes get a place and an image, at most.
    """
    shares, order = (counts / counts.sum()).sort(descending=True, stable=True)
    codes = model.quantizer.codes(order[:points])
    training = model.training
    images = model.eval().decoder(codes[:alone, :, None, None]).clamp(-1, 1)
    model.train(training)
    return Codes(shares, principal_plane(codes), images)


def principal_plane(vectors: Tensor) -> Tensor:
    """Vectors (n, D) in the plane of their two first principal components, (n, 2), on the CPU.

    Which side of an axis is positive is fixed, so that pictures of different steps compare.
    """
    vectors = vectors.double().cpu()
    vectors = vectors - vectors.mean(dim=0)
    if vectors.shape[1] == 1:
        return torch.cat([vectors, torch.zeros_like(vectors)], dim=1).float()
    axes = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -2:].flip(1)  # (D, 2)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return (vectors @ (axes * largest.sign())).float()
