"""The contract of all quantizers: options, the grid around the vectors, and the global batch.

This is the one file of vqvae with collectives: statistics are those of all processes.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn

MAX_CODES = 1 << 24  # over all depths; every code is counted
Encode = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> z_e (B, D, h, w)


def option(default: Any, description: str, **metadata: Any) -> Any:
    """A field of an options dataclass, with a line of help for the user.

    A default of None follows from other fields or the data. Metadata: `min`, `max` and `choices` of
    the value, or of each element of a tuple, which `check_fields` checks; `training_only=True`
    where it changes neither the weights' shapes nor what a trained model computes.
    """
    return field(default=default, metadata={"help": description, **metadata})


def commitment_cost() -> Any:
    """The option `commitment_cost`."""
    return option(0.25, "beta, the weight of the encoder's term", training_only=True)


def entropy_weight(default: float | None) -> Any:
    """The option `entropy_weight`."""
    description = "weight of the entropy term, for an even use of codes"
    return option(default, description, training_only=True)


def check_fields(config: Any) -> None:
    """Give the fields of a frozen dataclass their types (JSON has lists and whole floats).

    A ValueError if a value has another type, or is not within `min`, `max` or `choices`. Floats
    are weights and thresholds: finite and not negative.
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
    """What all quantizers have; a quantizer adds its own fields in a subclass."""

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
    """Output of a quantizer for an encoding z_e."""

    z_q: Tensor  # (B, D, h, w), bitwise what `embed(indices)` returns; its gradient reaches z_e
    indices: Tensor  # (B, h, w), int64 in [0, codebook_size); (B, h, w, depth) where depth > 1
    losses: dict[str, Tensor]  # scalars by name, already weighted; the training loss adds them up


class Quantizer(nn.Module):
    """The grid around vectors (N, D), which a subclass quantizes in float32, under autocast, too.

    A subclass has its own `Options` and defines `quantize`, `assign` and `lookup`, whose indices
    are (N, depth) for a depth above 1.

    A training calls `end_step()` once per optimiser step, after its forward passes. Where these are
    several (micro-batches), or of several processes, what a quantizer learns from its vectors is
    what it learns from the global batch in one pass; see `begin_step`.
    """

    Options: ClassVar[type[QuantizerOptions]] = QuantizerOptions  # the dataclass of its settings
    supports_reset: ClassVar[bool] = False  # by `reset_codebook()`
    # Methods with collectives and data-dependent shapes, not to be compiled.
    uncompiled: ClassVar[tuple[str, ...]] = ("batch_mean",)

    def __init__(self, options: QuantizerOptions) -> None:
        super().__init__()
        self.options = options
        self.entropy_weight = getattr(options, "entropy_weight", 0.0)
        self.batch_means: list[Tensor] = []  # see `observe`

    @property
    def usage_hint(self) -> str:
        """What to change when few codes are in use."""
        helpful = [x for x in ("dead_code_threshold", "entropy_weight") if hasattr(self.options, x)]
        more = f"a higher {' or '.join(helpful)}, or " if helpful else ""
        return f"use {more}a smaller codebook_size or learning_rate"

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

    def entropy_logits(self, vectors: Tensor) -> list[Tensor]:
        """Vectors (N, D) -> logits (N, K) of their soft assignments, of each part of the code."""
        raise NotImplementedError

    def entropy_loss(self, vectors: Tensor) -> Tensor:
        """Mean entropy of the assignments of vectors (N, D) minus that of their mean, in nats.

        It is low for confident, evenly used codes (arXiv 2310.05737, equation 6). The mean is that
        over the global batch; its gradient is that of these vectors alone, as gradients are
        averaged over processes and micro-batches.
        """
        loss = vectors.new_zeros(())
        for part, logits in enumerate(self.entropy_logits(vectors)):
            one, mean = assignment_entropy(logits)
            mean = mean + (self.batch_mean(part, mean.detach()) - mean.detach())
            # The mean of a code far from all vectors underflows to 0, where log has no slope.
            loss = loss + one + (mean * mean.clamp_min(1e-20).log()).sum()
        return loss

    def entropy_term(self, vectors: Tensor) -> dict[str, Tensor]:
        """The weighted entropy loss of vectors (N, D) by its name, if it has a weight."""
        weight = self.entropy_weight
        return {"entropy": weight * self.entropy_loss(vectors)} if weight > 0 else {}

    def batch_mean(self, part: int, mean: Tensor) -> Tensor:
        """The mean assignment over the global batch, (K,), given that over these vectors."""
        return self.batch_means[part] if self.batch_means else all_reduce_mean(mean.clone())

    def needs_batch(self) -> bool:
        """Whether the next step depends on its batch as a whole."""
        return self.entropy_weight > 0

    @torch.no_grad()
    def begin_step(self, encode: Encode, micro_batches: Sequence[Tensor]) -> None:
        """Prepare a step of several forward passes, each with equally many images.

        The encoder runs on all images once more where the quantizer `needs_batch`.
        """
        if len(micro_batches) > 1 and self.needs_batch():
            vectors = [_to_vectors(encode(images)) for images in micro_batches]
            with torch.autocast(vectors[0].device.type, enabled=False):
                self.observe(vectors)

    def observe(self, micro_batches: list[Tensor]) -> None:
        """Keep the mean assignments of all vectors of the step to come, (N, D) each."""
        if self.entropy_weight > 0:
            logits = zip(*map(self.entropy_logits, micro_batches), strict=True)
            means = ([assignment_entropy(one)[1] for one in part] for part in logits)
            self.batch_means = [all_reduce_mean(torch.stack(x).mean(dim=0)) for x in means]

    def end_step(self) -> None:
        """Learn from the vectors that were quantized in training mode since the last call."""
        self.batch_means = []

    def forward(self, z_e: Tensor) -> Quantized:
        """Encodings (B, D, h, w) -> `Quantized`."""
        with torch.autocast(z_e.device.type, enabled=False):
            z_q, indices, losses = self.quantize(_to_vectors(z_e))
        grid = z_e[:, 0].shape  # (B, h, w)
        return Quantized(_to_grid(z_q, grid), indices.unflatten(0, grid), losses)

    def nearest(self, z_e: Tensor) -> Tensor:
        """Encodings (B, D, h, w) -> indices (B, h, w), or (B, h, w, depth)."""
        with torch.autocast(z_e.device.type, enabled=False):
            return self.assign(_to_vectors(z_e)).unflatten(0, z_e[:, 0].shape)

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w), or (B, h, w, depth) -> z_q (B, D, h, w)."""
        with torch.autocast(indices.device.type, enabled=False):
            return _to_grid(self.lookup(indices.flatten(0, 2)), indices.shape[:3])

    def codes(self, numbers: Tensor) -> Tensor:
        """The codes at the given entries of `count`: (n,) -> (n, D)."""
        return self.lookup(numbers)

    def count(self, indices: Tensor) -> Tensor:
        """How often each code occurs in indices (...), or (..., depth): (num_codes,), int64."""
        size, depth = self.options.codebook_size, self.options.depth
        shifted = indices + size * torch.arange(depth, device=indices.device)
        return torch.bincount(shifted.flatten(), minlength=size * depth)


def _to_vectors(z_e: Tensor) -> Tensor:
    """(B, D, h, w) of any float type -> (B*h*w, D) in float32, or float64 for tests."""
    return z_e.to(torch.promote_types(z_e.dtype, torch.float32)).permute(0, 2, 3, 1).flatten(0, 2)


def _to_grid(vectors: Tensor, grid: torch.Size) -> Tensor:
    """(B*h*w, D) -> (B, D, h, w), where grid is (B, h, w)."""
    return vectors.unflatten(0, grid).permute(0, 3, 1, 2).contiguous()


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q, bitwise, with the gradient of z_e (arXiv 1711.00937, section 3.2)."""
    return z_q.detach() + (z_e - z_e.detach())


def assignment_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy, in nats, of assignments given by logits (N, K), and their mean (K,)."""
    log_probs = logits.log_softmax(dim=1)
    probs = log_probs.exp()
    return -(probs * log_probs).sum(dim=1).mean(), probs.mean(dim=0)


def process_rank() -> int:
    """The number of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean of `values` over all processes, in place."""
    return all_reduce_sum(values).div_(dist.get_world_size() if dist.is_initialized() else 1)


def all_gather(rows: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks; each has equally many."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
