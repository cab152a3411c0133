"""Distributions to sample from: guidance, logit filters, and counter-based random numbers."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.config import check_fields, option

# To divide by less than this is to divide by zero, in float32.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): logits = u + scale * (c - u).

    c are the logits with class and condition, u those without.

    Raises:
        ValueError: a scale that is negative or not finite, or an unknown schedule.
    """

    guidance_scale: float = option(
        1.0,
        "classifier-free guidance: above 1 samples follow class and condition more closely; 1: "
        "none",
        min=0,
        below=math.inf,
    )
    guidance_schedule: str = option(
        "constant",
        "how the scale rises from 1 at the first token to its value at the last; constant: no rise",
        choices=("constant", "linear", "cosine"),
    )
    guidance_power: float = option(
        1.0,
        "exponent of the progress in the schedule: above 1, the scale rises later; with cosine "
        "this is RAR's power-cosine",
        above=0,
        below=math.inf,
    )
    guidance_interval: tuple[float, float] = option(
        (0.0, 1.0),
        "part of the tokens that is guided, as 0.2,0.8; outside of it the scale is 1",
        metavar="START,END",
        min=0,
        max=1,
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def at(self, token: int, tokens: int) -> float:
        """The scale for token number `token` of `tokens`.

        Power-cosine (arXiv 2411.00776): (1 - cos(pi * progress^power)) / 2 of the way from 1. The
        interval is that of arXiv 2404.07724, over tokens instead of noise levels.
        """
        progress = token / max(1, tokens - 1)
        start, end = self.guidance_interval
        if not start <= progress <= end:
            return 1.0
        progress = 1.0 if self.guidance_schedule == "constant" else progress**self.guidance_power
        if self.guidance_schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.guidance_scale - 1) * progress


@dataclass(frozen=True)
class SamplingParams:
    """How the distribution of the model is filtered before sampling, in this order.

    top_p is nucleus sampling (arXiv 1904.09751), min_p is arXiv 2407.01082. The most likely index
    always stays.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = option(
        1.0, "below 1: safer, less varied samples; 0: the most likely", min=0, below=math.inf
    )
    top_k: int = option(0, "sample from the k most likely indices; 0: from all", min=0)
    top_p: float = option(
        1.0,
        "nucleus sampling: the most likely indices whose probabilities sum to p",
        above=0,
        max=1,
    )
    min_p: float = option(
        0.0, "sample from indices with this fraction of the highest probability", min=0, max=1
    )

    def __post_init__(self) -> None:
        check_fields(self)


NO_GUIDANCE, DEFAULT_PARAMS = Guidance(), SamplingParams()


def probabilities(logits: Tensor, params: SamplingParams = DEFAULT_PARAMS) -> Tensor:
    """The distribution to sample from.

    Args:
        logits: (..., K).
        params: the filters.

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
        return _apply_min_p(logits.softmax(dim=-1), params.min_p)
    if top_k:
        ordered, order = logits.topk(top_k, dim=-1)
    else:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.softmax(dim=-1)
    if params.top_p < 1:
        before = ordered.cumsum(dim=-1) - ordered  # probability of all more likely indices
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    ordered = _apply_min_p(ordered, params.min_p)
    return torch.zeros_like(logits).scatter(-1, order, ordered)


def _apply_min_p(distribution: Tensor, min_p: float) -> Tensor:
    """Keep what has this fraction of the highest probability, and renormalise."""
    if min_p == 0:
        return distribution
    bar = distribution.amax(dim=-1, keepdim=True) * min_p
    kept = distribution.masked_fill(distribution < bar, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def sample_from_probs(distribution: Tensor, uniform: Tensor) -> Tensor:
    """One index from each distribution, by inversion of its cumulative distribution.

    Args:
        distribution: (B, K), each row summing to 1; indices of probability 0 are never sampled.
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


def guide_and_sample(
    logits: Tensor, uniform: Tensor, params: SamplingParams, scale: Tensor | None
) -> Tensor:
    """Sampled indices, (B,), int64.

    Args:
        logits: (B, K); with a scale (2B, K), first conditional, then unconditional.
        uniform: (B,) in [0, 1).
        params: see `probabilities`.
        scale: (), of the guidance, see `Guidance.at`; None for none.
    """
    logits = logits.float()
    if scale is not None:
        cond, uncond = logits.chunk(2)
        logits = torch.lerp(uncond, cond, scale)
    return sample_from_probs(probabilities(logits, params), uniform)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN_RATIO = _signed(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def random_keys(seed: int, images: Tensor) -> Tensor:
    """One key of the random numbers per image, (B,), int64.

    Args:
        seed: any integer.
        images: (B,), int64, number of each image.
    """
    return _mix(images * GOLDEN_RATIO + _signed(seed))


def uniform(keys: Tensor, token: Tensor | int) -> Tensor:
    """A number in [0, 1) for one token of each image, (B,), float32.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a hash of seed, image and token, so that a
    sample depends on nothing else: not on the batch, nor on the tokens before.

    Args:
        keys: (B,), of `random_keys`.
        token: number of the token in the image; (1,) or one for each.
    """
    steps = (torch.as_tensor(token, device=keys.device) + 1) * GOLDEN_RATIO  # modulo 2^64
    return (_mix(keys + steps) >> 40 & (1 << 24) - 1).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; that of signed numbers is arithmetic."""
    return x >> bits & (1 << 64 - bits) - 1
