"""`residual`: several codes a cell, each for what those before it left over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vqvae.quantizers.contract import Quantizer
from vqvae.quantizers.ema import EMAQuantizer
from vqvae.quantizers.estimators import GRADIENTS

if TYPE_CHECKING:
    from vqvae.quantizers.config import QuantizerConfig


class ResidualQuantizer(Quantizer):
    """A stack of `depth` EMA codebooks (arXiv 2107.03312, section III.C; arXiv 2203.01941).

    Its indices have an axis of length depth, coarse first; z_q is the sum of the codes.
    """

    ENTROPY_WEIGHT = 0.0  # of the term of each depth
    GRADIENTS = tuple(GRADIENTS)
    CURE = EMAQuantizer.CURE
    RESTARTS = True

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        one = replace(config, quantizer="ema", depth=1)
        self.layers = nn.ModuleList(EMAQuantizer(one) for _ in range(config.depth))

    @classmethod
    def settle(cls, config: QuantizerConfig) -> dict[str, object]:
        """4 codes a cell where nothing else is said."""
        return super().settle(config) | {"depth": config.depth or 4}

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N, depth)."""
        indices = []
        for layer in self.layers:
            indices.append(layer.assign(vectors))
            vectors = vectors - layer.lookup(indices[-1])
        return torch.stack(indices, dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N, depth) -> sums of codes (N, D)."""
        codes = [layer.lookup(indices[:, depth]) for depth, layer in enumerate(self.layers)]
        return sum(codes[1:], start=codes[0])

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N, depth), losses."""
        indices, losses = [], {}
        rest = vectors
        for layer in self.layers:
            _, chosen, terms = layer.quantize(rest)
            indices.append(chosen)
            # Each depth draws the vectors towards the sum so far, a constant.
            rest = rest - layer.lookup(chosen).detach()
            losses = {name: losses.get(name, 0.0) + term for name, term in terms.items()}
        stacked = torch.stack(indices, dim=1)
        codes = self.lookup(stacked)
        return GRADIENTS[self.config.gradient](vectors, codes), stacked, losses

    def restart(self) -> None:
        """Let the codes of all depths start anew from the next batch."""
        for layer in self.layers:
            layer.restart()

    def codes(self, numbers: Tensor) -> Tensor:
        """The codes of all depths, those of the first before those of the second: (n, D)."""
        return torch.cat([layer.codebook for layer in self.layers])[numbers]

    def count(self, indices: Tensor) -> Tensor:
        """How often each code of each depth occurs in (..., depth): (depth*codebook_size,)."""
        size, depth = self.config.codebook_size, self.config.depth
        shifted = indices + size * torch.arange(depth, device=indices.device)
        return torch.bincount(shifted.flatten(), minlength=size * depth)
