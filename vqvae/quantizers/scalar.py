"""Scalar quantizers: each dimension by itself, without a codebook to learn: `fsq` and `lfq`."""

from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.quantizers.base import (
    Quantizer,
    QuantizerOptions,
    commitment_cost,
    entropy,
    entropy_weight,
    option,
    straight_through,
)

MAX_DIM = 24  # two levels in each of more dimensions are more codes than allowed


def levels_for(codebook_size: int) -> tuple[int, ...]:
    """Levels of 8 and 4 whose product is `codebook_size`, a power of two of at least 16.

    Raises:
        ValueError: it is not.
    """
    bits = round(log2(codebook_size))
    if codebook_size != 2**bits or bits < 4:
        raise ValueError(
            f"fsq has no levels for codebook_size {codebook_size}; use a power of two of at least "
            "16, or give the levels of each dimension, for example levels 8,5,5,5"
        )
    fours = -bits % 3  # as many dimensions of 2 bits as make the rest divisible by 3
    return (8,) * ((bits - 2 * fours) // 3) + (4,) * fours


@dataclass(frozen=True)
class FSQOptions(QuantizerOptions):
    """Options of `fsq`. codebook_size is the product of the levels, codebook_dim their number."""

    codebook_dim: int = option(3, "dimension D of a code")
    levels: tuple[int, ...] = option((8, 8, 8), "levels of each dimension, as 8,5,5,5")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (len(self.levels), prod(self.levels)) != (self.codebook_dim, self.codebook_size):
            raise ValueError(
                f"levels {self.levels} do not give codebook_size {self.codebook_size} and "
                f"codebook_dim {self.codebook_dim}; leave these out"
            )

    @classmethod
    def resolve_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Levels from the codebook size or vice versa, and the dimension from both."""
        levels = values.get("levels") or levels_for(values.get("codebook_size", cls.codebook_size))
        if len(levels) > MAX_DIM:
            raise ValueError(f"levels must be {MAX_DIM} at most, got {len(levels)}")
        if min(levels) < 2:
            raise ValueError(f"levels must be at least 2 each, got {levels}")
        sizes = {"codebook_size": prod(levels), "codebook_dim": len(levels)}
        return sizes | values | {"levels": levels}


class FiniteScalarQuantizer(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505, section 3.1): codes are a grid in [-1, 1]^D.

    Dimension i has `levels[i]` values; the codebook is all of their combinations, index 0 the
    lowest value everywhere, and the first dimension varies fastest.
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
        return (vectors + (offset / spread).atanh()).tanh() * spread - offset + middle

    def round(self, steps: Tensor) -> Tensor:
        """Steps (N, D) -> the nearest whole ones."""
        return steps.round().clamp(min=0).minimum(self.levels - 1)

    def values(self, steps: Tensor) -> Tensor:
        """Whole steps (N, D) from 0 to levels - 1 -> codes (N, D) in [-1, 1]."""
        return (steps - self.levels // 2) / (self.levels // 2)

    def index(self, steps: Tensor) -> Tensor:
        """Whole steps (N, D) -> indices (N,)."""
        return (steps.long() * self.strides).sum(dim=1)

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,)."""
        return self.index(self.round(self.steps(vectors)))

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D)."""
        return self.values(indices[:, None] // self.strides % self.levels)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), no losses."""
        steps = self.steps(vectors)
        rounded = self.round(steps.detach())
        return straight_through(self.values(steps), self.values(rounded)), self.index(rounded), {}


@dataclass(frozen=True)
class LFQOptions(QuantizerOptions):
    """Options of `lfq`. codebook_size is 2^codebook_dim."""

    codebook_dim: int = option(9, "dimension D of a code")
    commitment_cost: float = commitment_cost()
    entropy_weight: float = entropy_weight(0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook_size != 2**self.codebook_dim:
            raise ValueError(
                f"codebook_size {self.codebook_size} is not 2 to the power of codebook_dim "
                f"{self.codebook_dim}; leave one of them out"
            )

    @classmethod
    def resolve_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The dimension from the codebook size, a power of two, or vice versa."""
        dim = values.get("codebook_dim", cls.codebook_dim)
        if dim > MAX_DIM:
            raise ValueError(f"lfq can have a codebook_dim of at most {MAX_DIM}, got {dim}")
        size = values.get("codebook_size", 2**dim)
        if size < 2 or size != 2 ** round(log2(size)):
            raise ValueError(f"lfq needs a codebook_size that is a power of two, got {size}")
        return {"codebook_size": size, "codebook_dim": round(log2(size))} | values


class LookupFreeQuantizer(Quantizer):
    """Lookup-free quantization (arXiv 2310.05737, section 3): codes are the corners of [-1, 1]^D.

    Bit i of the index is 1 where dimension i is above 0. The entropy term makes each bit confident
    and all combinations of bits common. Combinations are taken within groups of up to GROUP bits:
    exact up to K = 2^GROUP, beyond it an upper bound on the mean's entropy (arXiv 2409.04410,
    section 3.1).
    """

    options: LFQOptions
    bits: Tensor  # (D,)
    Options = LFQOptions
    usage_hint = "use a higher entropy_weight, or a smaller codebook_size or learning_rate"
    GROUP = 9  # bits
    SOFTNESS = 1.0  # of the assignment of a vector to corners by squared distance

    def __init__(self, options: LFQOptions) -> None:
        super().__init__(options)
        self.register_buffer("bits", 2 ** torch.arange(options.codebook_dim), persistent=False)

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,)."""
        return ((vectors > 0) * self.bits).sum(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D) of -1 and 1."""
        return torch.where((indices[:, None] & self.bits) > 0, 1.0, -1.0)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D), indices (N,), losses."""
        indices = self.assign(vectors)
        codes = self.lookup(indices)
        losses = {"commitment": self.options.commitment_cost * F.mse_loss(vectors, codes)}
        if self.options.entropy_weight > 0:
            losses["entropy"] = self.options.entropy_weight * self.entropy_loss(vectors)
        return straight_through(vectors, codes), indices, losses

    def entropy_loss(self, vectors: Tensor) -> Tensor:
        """Mean entropy of the assignments minus the entropy of their mean, in nats."""
        loss = vectors.new_zeros(())
        for group in vectors.split(self.GROUP, dim=1):
            bits = torch.arange(group.shape[1], device=group.device)
            corners = torch.arange(2 ** len(bits), device=group.device)[:, None] >> bits & 1
            # -|v - c|^2 is 2 v.c plus a term that is equal for all corners.
            one, mean = entropy(2 / self.SOFTNESS * group @ (2.0 * corners - 1).T)
            loss = loss + one - mean
        return loss
