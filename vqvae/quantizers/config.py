"""The settings of a quantizer."""

from dataclasses import dataclass, field
from math import inf

from vqvae.quantizers.estimators import GRADIENTS
from vqvae.quantizers.table import QUANTIZERS

MOST_CODES = 1 << 24


@dataclass(frozen=True)
class QuantizerConfig:
    """Everything that is needed to build a quantizer; what is left open is settled at once.

    Raises:
        ValueError: a value is out of its range, or contradicts another.
    """

    quantizer: str = field(
        default="vq",
        metadata={
            "help": "vq: nearest code by distance; ema: the same, codes as moving averages; "
            "cosine: by angle, on the unit sphere; gumbel: named by the encoder; fsq: each "
            "dimension rounded; lfq: each dimension one bit; ibq: all codes learn at once; "
            "residual: several codes a cell",
            "choices": tuple(QUANTIZERS),
        },
    )
    codebook_size: int | None = field(
        default=None,
        metadata={"help": "number of codes K (default: 512; fsq: the product of its levels)"},
    )
    codebook_dim: int | None = field(
        default=None,
        metadata={"help": "dimension of a code D (default: 8; fsq and lfq: follows from K)"},
    )
    levels: tuple[int, ...] = field(
        default=(),
        metadata={"help": "fsq: levels of each dimension, as 8,5,5,5 (default: from K)"},
    )
    depth: int | None = field(
        default=None, metadata={"help": "residual: codes a cell (default: 4; all others: 1)"}
    )
    commitment_cost: float = field(
        default=0.25, metadata={"help": "beta, the weight of the encoder's term"}
    )
    gradient: str = field(
        default="straight_through",
        metadata={
            "help": "how gradients pass the quantizer: `straight_through` copies them; `rotation` "
            "rotates and scales them (rotation trick)",
            "choices": tuple(GRADIENTS),
        },
    )
    entropy_weight: float | None = field(
        default=None,
        metadata={
            "help": "weight of the entropy term: confident assignments, evenly used codes; not for "
            "fsq (default: lfq 0.1, ibq 0.2, gumbel 0.0005, others 0)"
        },
    )
    revive_below: float = field(
        default=0.03,
        metadata={
            "help": "not for fsq and lfq: replace codes used less than this share of 1/K; 0 leaves "
            "dead codes dead"
        },
    )

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {tuple(QUANTIZERS)}, got {self.quantizer}")
        for name, least in (("codebook_size", 2), ("codebook_dim", 1), ("depth", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("commitment_cost", "revive_below", "entropy_weight"):
            if not 0 <= (getattr(self, name) or 0) < inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {getattr(self, name)}")
        quantizer = QUANTIZERS[self.quantizer]
        if self.gradient not in quantizer.GRADIENTS:
            raise ValueError(
                f"{self.quantizer} has no gradient {self.gradient!r}, only {quantizer.GRADIENTS}"
            )
        if self.entropy_weight and quantizer.ENTROPY_WEIGHT is None:
            raise ValueError(f"{self.quantizer} has no entropy term; leave out entropy_weight")
        if self.entropy_weight is None:
            object.__setattr__(self, "entropy_weight", quantizer.ENTROPY_WEIGHT or 0.0)
        for name, value in ({"levels": ()} | quantizer.settle(self)).items():
            if getattr(self, name) not in (None, (), value):
                raise ValueError(
                    f"{name} {getattr(self, name)} does not fit {self.quantizer}, where it is "
                    f"{value}; give that, or leave it out"
                )
            object.__setattr__(self, name, value)
        if self.num_codes > MOST_CODES:
            raise ValueError(
                f"codebook_size (over all depths) must be at most {MOST_CODES:,}, as every code is "
                f"counted; got {self.num_codes:,}"
            )

    @property
    def num_codes(self) -> int:
        """Codes of all depths together."""
        return self.codebook_size * self.depth
