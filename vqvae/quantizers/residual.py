"""`residual`: several codes per latent position, each for the residual of those before it."""

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from vqvae.quantizers.base import Quantizer, option
from vqvae.quantizers.vector import GRADIENTS, EMAQuantizer, VQOptions


@dataclass(frozen=True)
class ResidualOptions(VQOptions):
    """Options of `residual`: those of `ema`, for the codebook of each depth, and their number."""

    depth: int = option(4, "codes per latent position")


class ResidualQuantizer(Quantizer):
    """A stack of `depth` EMA codebooks (arXiv 2107.03312, section III.C; arXiv 2203.01941).

    Its indices have an axis of length depth, coarse first; z_q is the sum of the codes.
    """

    options: ResidualOptions
    Options = ResidualOptions
    supports_reset = True

    def __init__(self, options: ResidualOptions) -> None:
        super().__init__(options)
        one = VQOptions(**{field.name: getattr(options, field.name) for field in fields(VQOptions)})
        layers = nn.ModuleList(EMAQuantizer(one) for _ in range(options.depth))
        self.layers = cast(list[EMAQuantizer], layers)

    def assign(self, vectors: Tensor) -> Tensor:
        indices = []
        for layer in self.layers:
            indices.append(layer.assign(vectors))
            vectors = vectors - layer.lookup(indices[-1])
        return torch.stack(indices, dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        codes = [layer.lookup(indices[:, depth]) for depth, layer in enumerate(self.layers)]
        return sum(codes[1:], start=codes[0])

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        residual, chosen = vectors, []
        losses: dict[str, Tensor] = {}
        for layer in self.layers:
            _, indices, terms = layer.quantize(residual)
            chosen.append(indices)
            # Each depth moves the encoder towards the sum of codes so far, a constant.
            residual = residual - layer.lookup(indices).detach()
            losses = {name: losses.get(name, 0) + term for name, term in terms.items()}
        indices = torch.stack(chosen, dim=1)
        z_q = GRADIENTS[self.options.gradient](vectors, self.lookup(indices))
        return z_q, indices, losses

    def needs_batch(self) -> bool:
        return any(layer.needs_batch() for layer in self.layers)

    def observe(self, micro_batches: list[Tensor]) -> None:
        for layer in self.layers:
            layer.observe(micro_batches)
            micro_batches = [x - layer.lookup(layer.assign(x)) for x in micro_batches]

    def end_step(self) -> None:
        for layer in self.layers:
            layer.end_step()

    def reset_codebook(self) -> None:
        for layer in self.layers:
            layer.reset_codebook()

    def codes(self, numbers: Tensor) -> Tensor:
        # Those of the first depth come before those of the second, and so on.
        return torch.cat([layer.codebook for layer in self.layers])[numbers]
