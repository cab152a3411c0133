"""Logits to indices: guidance, the distribution that is drawn from, and the draw."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEDULES = ("constant", "linear", "cosine")
# To divide by less than this is to divide by zero, in float32.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): logits = u + scale * (c - u).

    Attributes:
        scale: 1 for none; the logits c know the class and the condition, u neither.
        schedule: "constant", or how the scale rises from 1 at the first token to `scale` at the
            last: "linear" or "cosine".

    Raises:
        ValueError: a scale that is negative or not finite, or an unknown schedule.
    """

    scale: float = 1.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"guidance_scale must be 0 or more and finite, got {self.scale}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule must be one of {SCHEDULES}, got {self.schedule}")

    def at(self, token: int, tokens: int) -> float:
        """The scale for token number `token` of `tokens`."""
        progress = token / max(1, tokens - 1)
        if self.schedule == "constant":
            progress = 1.0
        elif self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.scale - 1) * progress


@dataclass(frozen=True)
class SamplingParams:
    """What becomes of the model's distribution before it is drawn from, in this order.

    Attributes:
        temperature: divides the logits; 0 leaves the most likely index alone.
        top_k: keep the k most likely indices; 0 keeps all.
        top_p: of these keep the most likely ones that reach this probability together
            (nucleus sampling, arXiv 1904.09751); the most likely one always stays.
        min_p: of these keep those that have at least this share of the most likely one's
            probability (arXiv 2407.01082); 0 keeps all.

    Raises:
        ValueError: a temperature that is negative or not finite, top_k < 0, top_p outside (0, 1],
            or min_p outside [0, 1].
    """

    temperature: float = field(
        default=1.0, metadata={"help": "below 1: safer, less varied samples; 0: the most likely"}
    )
    top_k: int = field(
        default=0, metadata={"help": "draw from the k most likely indices; 0: from all"}
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "nucleus sampling: the most likely indices whose probabilities sum to p"},
    )
    min_p: float = field(
        default=0.0,
        metadata={"help": "draw from those with this share of the most likely one's probability"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")


NO_GUIDANCE, DEFAULT_PARAMS = Guidance(), SamplingParams()


def probabilities(logits: Tensor, params: SamplingParams = DEFAULT_PARAMS) -> Tensor:
    """The distribution to draw from.

    Args:
        logits: (..., K).
        params: what is made of it.

    Returns:
        (..., K), float32, each summing to 1.
    """
    logits, size = logits.float(), logits.shape[-1]
    if params.temperature < SMALLEST_TEMPERATURE:
        return F.one_hot(logits.argmax(dim=-1), size).float()
    # The most likely one at 0, so that no temperature takes it out of range.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    top_k = params.top_k if params.top_k < size else 0
    if not top_k and params.top_p == 1:
        return _at_least(logits.softmax(dim=-1), params.min_p)
    if top_k:
        ordered, order = logits.topk(top_k, dim=-1)
    else:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.softmax(dim=-1)
    if params.top_p < 1:
        before = ordered.cumsum(dim=-1) - ordered  # probability of all more likely indices
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    ordered = _at_least(ordered, params.min_p)
    return torch.zeros_like(logits).scatter(-1, order, ordered)


def _at_least(distribution: Tensor, min_p: float) -> Tensor:
    """The distribution of what has this share of the most likely one's probability."""
    if min_p == 0:
        return distribution
    bar = distribution.amax(dim=-1, keepdim=True) * min_p
    kept = distribution.masked_fill(distribution < bar, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """One index from each distribution, by the inverse of its cumulative distribution.

    An image's indices follow from its own uniform numbers, whatever else is in the batch.

    Args:
        distribution: (B, K), each line summing to 1; indices of probability 0 are never drawn.
        uniform: (B,) in [0, 1).

    Returns:
        (B,), int64.
    """
    cumulative = distribution.cumsum(dim=-1)
    # Rounding may leave the total a little off 1: the number is scaled, and kept below it.
    target = torch.minimum(
        uniform.to(cumulative) * cumulative[:, -1],
        torch.nextafter(cumulative[:, -1], torch.zeros_like(uniform).to(cumulative)),
    )
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def choose(
    logits: Tensor, uniform: Tensor, params: SamplingParams, scale: Tensor | float | None
) -> Tensor:
    """The indices that are drawn, (B,), int64.

    Args:
        logits: (B, K); with a scale (2B, K), first those that know class and condition, then those
            that do not.
        uniform: (B,) in [0, 1).
        params: see `probabilities`.
        scale: of the guidance, see `Guidance.at`; None for none.
    """
    logits = logits.float()
    if scale is not None:
        informed, without = logits.chunk(2)
        logits = torch.lerp(without, informed, scale)
    return draw(probabilities(logits, params), uniform)
