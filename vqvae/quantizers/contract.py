"""What every quantizer is: a module that turns each cell of a grid into indices, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig


class Quantized(NamedTuple):
    """What a quantizer makes of an encoding z_e.

    Attributes:
        z_q: (B, D, h, w), exactly what `embed(indices)` gives; its gradient goes on to z_e.
        indices: (B, h, w), int64 in [0, codebook_size); (B, h, w, depth) where depth > 1.
        losses: scalars that the training loss adds up as they are, by name.
    """

    z_q: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module):
    """The grid around what a subclass does to vectors (N, D), in float32 also under autocast.

    A subclass is made from a `QuantizerConfig` and has

        quantize(vectors) -> z_q (N, D) with its gradient, indices (N,), losses
        assign(vectors)   -> indices (N,), without noise and without a side effect
        lookup(indices)   -> z_q (N, D)

    where indices are (N, depth) for a depth above 1.

    Attributes:
        ENTROPY_WEIGHT: default of the entropy term's weight; None where there is no such term.
        GRADIENTS: the ways that the gradient can take from z_q to z_e.
        IDLE: settings of `QuantizerConfig` that make no difference to it.
        CURE: what to do when few of its codes are in use.
        RESTARTS: whether it has `restart()`, which lets its codes start anew from the next batch.
    """

    ENTROPY_WEIGHT: float | None = None
    GRADIENTS: tuple[str, ...] = ("straight_through",)
    IDLE: tuple[str, ...] = ()
    CURE = "use a smaller --codebook_size or --learning_rate"
    RESTARTS = False

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def settle(cls, config: QuantizerConfig) -> dict[str, object]:
        """The settings that follow from the others, or that the user left open.

        Raises:
            ValueError: the others allow none.
        """
        return {
            "codebook_size": config.codebook_size or 512,
            "codebook_dim": config.codebook_dim or 8,
            "depth": 1,
        }

    def forward(self, z_e: Tensor) -> Quantized:
        """Encodings (B, D, h, w) -> `Quantized`."""
        with torch.autocast(z_e.device.type, enabled=False):
            z_q, indices, losses = self.quantize(to_vectors(z_e))
        return Quantized(to_grid(z_q, z_e), _to_cells(indices, z_e), losses)

    def nearest(self, z_e: Tensor) -> Tensor:
        """Encodings (B, D, h, w) -> indices (B, h, w), or (B, h, w, depth)."""
        with torch.autocast(z_e.device.type, enabled=False):
            return _to_cells(self.assign(to_vectors(z_e)), z_e)

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w), or (B, h, w, depth) -> z_q (B, D, h, w)."""
        with torch.autocast(indices.device.type, enabled=False):
            z_q = self.lookup(indices.flatten(0, 2))
        return z_q.unflatten(0, indices.shape[:3]).permute(0, 3, 1, 2).contiguous()

    def codes(self, numbers: Tensor) -> Tensor:
        """The codes themselves, by their places in `count`: (n,) -> (n, D)."""
        return self.lookup(numbers)

    def count(self, indices: Tensor) -> Tensor:
        """How often each code occurs in indices of any shape: (codebook_size,), int64."""
        return torch.bincount(indices.flatten(), minlength=self.config.codebook_size)


def to_vectors(z_e: Tensor) -> Tensor:
    """(B, D, h, w) of any float type -> (B*h*w, D) in float32."""
    return z_e.float().permute(0, 2, 3, 1).flatten(0, 2)


def to_grid(vectors: Tensor, z_e: Tensor) -> Tensor:
    """(B*h*w, D) -> (B, D, h, w) as z_e is."""
    batch, _, height, width = z_e.shape
    return vectors.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()


def _to_cells(indices: Tensor, z_e: Tensor) -> Tensor:
    """(B*h*w,) -> (B, h, w); (B*h*w, depth) -> (B, h, w, depth)."""
    batch, _, height, width = z_e.shape
    return indices.view(batch, height, width, *indices.shape[1:])
