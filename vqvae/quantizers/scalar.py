"""Scalar quantizers: each dimension by itself, without a codebook to learn: `fsq` and `lfq`."""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.quantizers import base
from vqvae.quantizers.base import Quantizer, QuantizerOptions, option, straight_through


def levels_for(codebook_size: int) -> tuple[int, ...]:
    """Levels of 8 and 4 whose product is `codebook_size`, a power of two of at least 16."""
    bits = codebook_size.bit_length() - 1
    if codebook_size != 2**bits or bits < 4:
        raise ValueError(
            f"fsq has no levels for codebook_size {codebook_size}; use a power of two from 16 on, "
            "or give levels, as 8,5,5,5"
        )
    fours = -bits % 3  # as many dimensions of 2 bits as make the rest divisible by 3
    return (8,) * ((bits - 2 * fours) // 3) + (4,) * fours


@dataclass(frozen=True)
class FSQOptions(QuantizerOptions):
    """Options of `fsq`. codebook_size is the product of `levels`, codebook_dim their number."""

    codebook_size: int = option(None, "number of codes K", min=2, max=base.MAX_CODES)
    codebook_dim: int = option(None, "dimension D of a code", min=1)
    levels: tuple[int, ...] = option(None, "levels of each dimension, as 8,5,5,5", min=2)

    def __post_init__(self) -> None:
        base.check_fields(self)
        levels = self.levels or levels_for(self.codebook_size or 512)
        self.derive(levels=levels, codebook_size=prod(levels), codebook_dim=len(levels))
        super().__post_init__()


class FiniteScalarQuantizer(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505, section 3.1): codes are a grid in [-1, 1]^D.

    Dimension i has `levels[i]` values, in index 0 the lowest; the first dimension varies fastest.
    """

    options: FSQOptions
    levels: Tensor  # (D,)
    strides: Tensor  # (D,)
    Options = FSQOptions
    MARGIN = 1e-3  # puts the outermost levels within reach of the tanh

    def __init__(self, options: FSQOptions) -> None:
        super().__init__(options)
        levels = torch.tensor(options.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", levels.cumprod(0) // levels, persistent=False)

    def steps(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> the same bounded to about [0, levels - 1], before rounding."""
        spread = (self.levels - 1) * (1 + self.MARGIN) / 2
        # With an even number of levels, 0 falls on the lower of the two in the middle.
        middle = (self.levels // 2).float()
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        # With 2 levels that would be the end of the tanh, without a gradient: 0 is between them.
        shift = torch.where(self.levels == 2, 0.0, (offset / spread).atanh())
        return (vectors + shift).tanh() * spread - offset + middle

    def round(self, steps: Tensor) -> Tensor:
        return steps.round().clamp(min=0).minimum(self.levels - 1)

    def values(self, steps: Tensor) -> Tensor:
        """Whole steps (N, D) from 0 to levels - 1 -> codes (N, D) in [-1, 1]."""
        return (steps - self.levels // 2) / (self.levels // 2)

    def index(self, steps: Tensor) -> Tensor:
        """Whole steps (N, D) -> indices (N,)."""
        return (steps.long() * self.strides).sum(dim=1)

    def assign(self, vectors: Tensor) -> Tensor:
        return self.index(self.round(self.steps(vectors)))

    def lookup(self, indices: Tensor) -> Tensor:
        return self.values(indices[:, None] // self.strides % self.levels)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        steps = self.steps(vectors)
        rounded = self.round(steps.detach())
        return straight_through(self.values(steps), self.values(rounded)), self.index(rounded), {}


@dataclass(frozen=True)
class LFQOptions(QuantizerOptions):
    """Options of `lfq`. codebook_size is 2^codebook_dim."""

    codebook_size: int = option(None, "number of codes K", min=2)
    codebook_dim: int = option(None, "dimension D of a code", min=1, max=24)
    commitment_cost: float = base.commitment_cost()
    entropy_weight: float = base.entropy_weight(0.1)

    def __post_init__(self) -> None:
        base.check_fields(self)
        size = self.codebook_size or 512
        dim = self.codebook_dim or size.bit_length() - 1
        if self.codebook_dim is None and size != 2**dim:
            raise ValueError(f"lfq needs a codebook_size that is a power of two, got {size}")
        self.derive(codebook_size=2**dim, codebook_dim=dim)
        super().__post_init__()


class LookupFreeQuantizer(Quantizer):
    """Lookup-free quantization (arXiv 2310.05737, section 3): codes are the corners of [-1, 1]^D.

    Bit i of the index is 1 where dimension i is above 0. The entropy term is taken within groups of
    up to GROUP bits: exact up to K = 2^GROUP, beyond it with an upper bound on the mean's entropy
    (arXiv 2409.04410, section 3.1). The paper weights its losses, 0.25 and 0.1, against a
    reconstruction loss of order 1; `SCALE` brings them to that of a squared error of images.
    """

    options: LFQOptions
    bits: Tensor  # (D,)
    Options = LFQOptions
    SCALE = 1 / 32
    GROUP = 9  # bits

    def __init__(self, options: LFQOptions) -> None:
        super().__init__(options)
        self.register_buffer("bits", 2 ** torch.arange(options.codebook_dim), persistent=False)

    def assign(self, vectors: Tensor) -> Tensor:
        return ((vectors > 0) * self.bits).sum(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D) of -1 and 1."""
        return torch.where((indices[:, None] & self.bits) > 0, 1.0, -1.0)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        indices = self.assign(vectors)
        codes = self.lookup(indices)
        commitment = self.options.commitment_cost * F.mse_loss(vectors, codes)
        losses = {"commitment": commitment, **self.entropy_term(vectors)}
        scaled = {name: self.SCALE * loss for name, loss in losses.items()}
        return straight_through(vectors, codes), indices, scaled

    def entropy_logits(self, vectors: Tensor) -> list[Tensor]:
        parts = []
        for group in vectors.split(self.GROUP, dim=1):
            bits = torch.arange(group.shape[1], device=group.device)
            corners = torch.arange(2 ** len(bits), device=group.device)[:, None] >> bits & 1
            # -|v - c|^2 is 2 v.c plus a term that is equal for all corners.
            parts.append(2 * group @ (2.0 * corners - 1).T.to(group))
        return parts
