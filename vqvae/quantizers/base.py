"""The contract of all quantizers: options, the grid around the vectors, and what several share."""

import types
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

MAX_CODES = 1 << 24  # over all depths; every code is counted


def option(default: Any, description: str, **metadata: Any) -> Any:
    """A field of an options dataclass, which `check_fields` checks.

    Args:
        default: its value where none is given; None: it follows from other fields or the data.
        description: one line for the user.
        metadata: `min`, `max` (of each element of a tuple), `choices`; `training_only=True` where
            the value changes neither the weights' shapes nor what a trained model computes.
    """
    return field(default=default, metadata={"help": description, **metadata})


def commitment_cost() -> Any:
    """The option `commitment_cost`."""
    return option(0.25, "beta, the weight of the encoder's term", training_only=True)


def entropy_weight(default: float) -> Any:
    """The option `entropy_weight`."""
    description = "weight of the entropy term: confident assignments, evenly used codes"
    return option(default, description, training_only=True)


def check_fields(config: Any) -> None:
    """Give the fields of a frozen dataclass their types (JSON has lists and whole floats).

    Numbers with a fraction are weights and thresholds: finite and not negative.

    Raises:
        ValueError: a value has another type, or is not within `min`, `max` or `choices`.
    """
    hints = get_type_hints(type(config))
    for each in fields(config):
        name, value, limits = each.name, getattr(config, each.name), each.metadata
        if value is None and each.default is None:
            continue
        try:
            value = _convert(value, hints[name])
        except TypeError as error:
            kind = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"{name} must be {kind}, got {value!r:.80}") from error
        object.__setattr__(config, name, value)
        for x in value if isinstance(value, tuple) else (value,):
            low, high = limits.get("min", 0 if type(x) is float else None), limits.get("max")
            if "choices" in limits and x not in limits["choices"]:
                choices = ", ".join(map(str, limits["choices"]))
                raise ValueError(f"{name} must be one of {choices}, got {x!r:.80}")
            if low is not None and not (x >= low and isfinite(x)):
                raise ValueError(f"{name} must be at least {low}, got {x}")
            if high is not None and x > high:
                raise ValueError(f"{name} must be at most {high}, got {x}")


def _convert(value: Any, kind: Any) -> Any:
    arguments = get_args(kind)
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _convert(value, arguments[0])
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) != len(value):
            raise TypeError
        return tuple(map(_convert, value, kinds))
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    return value


@dataclass(frozen=True)
class QuantizerOptions:
    """What all quantizers have; a quantizer adds its own fields in a subclass.

    Raises:
        ValueError: a value is out of its range, or contradicts another.
    """

    codebook_size: int = option(512, "number of codes K", min=2, max=MAX_CODES)
    codebook_dim: int = option(8, "dimension D of a code", min=1, max=1 << 16)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_codes > MAX_CODES:
            raise ValueError(f"all depths together must have at most {MAX_CODES:,} codes")

    def derive(self, **values: Any) -> None:
        """Set fields that were not given to values that follow from others."""
        for name, value in values.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"{name} {getattr(self, name)} contradicts the other options, which give "
                    f"{value}; leave it out"
                )
            object.__setattr__(self, name, value)

    @property
    def depth(self) -> int:
        """Codes per latent position."""
        return 1

    @property
    def num_codes(self) -> int:
        """Codes of all depths together."""
        return self.codebook_size * self.depth


class Quantized(NamedTuple):
    """Output of a quantizer for an encoding z_e.

    Attributes:
        z_q: (B, D, h, w), bitwise what `embed(indices)` returns; its gradient reaches z_e.
        indices: (B, h, w), int64 in [0, codebook_size); (B, h, w, depth) where depth > 1.
        losses: scalars by name, already weighted; the training loss adds them up.
    """

    z_q: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module):
    """The grid around vectors (N, D), which a subclass quantizes in float32, under autocast, too.

    A subclass has its own `Options` and defines `quantize`, `assign` and `lookup`, whose indices
    are (N, depth) for a depth above 1.

    Attributes:
        Options: the dataclass of its settings.
        usage_hint: what to change when few of its codes are in use.
        supports_reset: whether `reset_codebook()` reinitialises the codes from the next batch.
        uncompiled: methods with collectives and data-dependent shapes, not to be compiled.
    """

    Options: ClassVar[type[QuantizerOptions]] = QuantizerOptions
    usage_hint: ClassVar[str] = "use a smaller codebook_size or learning_rate"
    supports_reset: ClassVar[bool] = False
    uncompiled: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: QuantizerOptions) -> None:
        super().__init__()
        self.options = options

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Vectors (N, D) -> z_q (N, D) with its gradient, indices (N,), losses."""
        raise NotImplementedError

    def assign(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,), without noise and without side effects."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (N,) -> codes (N, D)."""
        raise NotImplementedError

    def reset_codebook(self) -> None:
        """Reinitialise the codes from the next training batch, where `supports_reset`."""
        raise NotImplementedError

    def forward(self, z_e: Tensor) -> Quantized:
        """Encodings (B, D, h, w) -> `Quantized`."""
        with torch.autocast(z_e.device.type, enabled=False):
            z_q, indices, losses = self.quantize(_to_vectors(z_e))
        grid = z_e.permute(0, 2, 3, 1).shape[:3]  # (B, h, w)
        return Quantized(_to_grid(z_q, grid), indices.unflatten(0, grid), losses)

    def nearest(self, z_e: Tensor) -> Tensor:
        """Encodings (B, D, h, w) -> indices (B, h, w), or (B, h, w, depth)."""
        with torch.autocast(z_e.device.type, enabled=False):
            indices = self.assign(_to_vectors(z_e))
        return indices.unflatten(0, z_e.permute(0, 2, 3, 1).shape[:3])

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w), or (B, h, w, depth) -> z_q (B, D, h, w)."""
        with torch.autocast(indices.device.type, enabled=False):
            return _to_grid(self.lookup(indices.flatten(0, 2)), indices.shape[:3])

    def codes(self, numbers: Tensor) -> Tensor:
        """The codes at the given entries of `count`: (n,) -> (n, D)."""
        return self.lookup(numbers)

    def count(self, indices: Tensor) -> Tensor:
        """How often each code occurs in indices of any shape: (num_codes,), int64."""
        return torch.bincount(indices.flatten(), minlength=self.options.codebook_size)


def _to_vectors(z_e: Tensor) -> Tensor:
    """(B, D, h, w) of any float type -> (B*h*w, D) in float32."""
    return z_e.float().permute(0, 2, 3, 1).flatten(0, 2)


def _to_grid(vectors: Tensor, grid: torch.Size) -> Tensor:
    """(B*h*w, D) -> (B, D, h, w), where grid is (B, h, w)."""
    return vectors.unflatten(0, grid).permute(0, 3, 1, 2).contiguous()


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q, bitwise, with the gradient of z_e (arXiv 1711.00937, section 3.2)."""
    return z_q.detach() + (z_e - z_e.detach())


def entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy of assignments given by logits (N, K), and entropy of their mean, in nats.

    Confident, evenly used codes have a low first and a high second value: the loss is their
    difference (arXiv 2310.05737, equation 6).
    """
    log_probs = logits.log_softmax(dim=1)
    probs = log_probs.exp()
    mean = probs.mean(dim=0)
    # The mean probability of a code far from all vectors underflows to 0, where log has no slope.
    log_mean = mean.clamp_min(1e-20).log()
    return -(probs * log_probs).sum(dim=1).mean(), -(mean * log_mean).sum()
