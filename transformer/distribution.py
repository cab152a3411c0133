"""From logits to an index: guidance and filters, and random numbers by seed, image and token."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.config import check_fields, option

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny  # by less, one would divide by zero
# SplitMix64: 2^64 over the golden ratio, the shifts, and the factors, as signed numbers.
GOLDEN_RATIO = 0x9E3779B97F4A7C15 - (1 << 64)
SHIFTS = (30, 27, 31)
FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64), 1)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Classifier-free guidance (arXiv 2207.12598), then the filters of the distribution, in order.

    Guided logits are u + scale * (c - u): c are those with the prefix, u those without it, or
    without `guidance_parts`; in autoguidance (arXiv 2406.02507), u are a weaker model's with it.
    top_p is nucleus sampling (arXiv 1904.09751), min_p is arXiv 2407.01082, typical_p is arXiv
    2202.00666. All but the last always keep the most likely index.
    """

    temperature: float = option(
        1.0, "below 1: safer, less varied samples; 0: the most likely", min=0, below=math.inf
    )
    top_k: int = option(0, "sample from the k most likely indices; 0: from all", min=0)
    top_p: float = option(
        1.0, "nucleus sampling: the likeliest indices whose probabilities sum to p", above=0, max=1
    )
    min_p: float = option(
        0.0, "sample from indices with this fraction of the highest probability", min=0, max=1
    )
    typical_p: float = option(
        1.0, "typical sampling: indices near the expected information that sum to p", above=0, max=1
    )
    steps: int = option(
        0, "parallel decoding: sample all tokens in so many steps, 2 or more; 0: one a step", min=0
    )
    guidance_scale: float = option(
        1.0, "above 1, samples follow class and condition closely; 1: none", min=0, below=math.inf
    )
    guidance_schedule: str = option(
        "constant", "how the scale rises from 1", choices=("constant", "linear", "cosine")
    )
    guidance_power: float = option(
        1.0, "exponent of the progress; above 1, the scale rises later", above=0, below=math.inf
    )
    guidance_interval: tuple[float, float] = option(
        (0.0, 1.0), "guided part of the tokens, as 0.2,0.8", metavar="START,END", min=0, max=1
    )
    guidance_parts: str = option("", "what it strengthens of the prefix, as class; default: all")

    def __post_init__(self) -> None:
        check_fields(self)

    def scale_at(self, token: int, tokens: int) -> float:
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


def probabilities(logits: Tensor, params: SamplingParams = SamplingParams()) -> Tensor:
    """Logits (..., K) -> the distributions to sample from, (..., K), float32."""
    logits, size = logits.float(), logits.shape[-1]
    if params.temperature < SMALLEST_TEMPERATURE:
        return F.one_hot(logits.argmax(dim=-1), size).float()
    # The most likely one at 0, so that no temperature takes it out of range.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < size:
        ordered, order = logits.topk(params.top_k, dim=-1)
    elif params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    else:
        ordered, order = logits, None  # by index
    distribution = _first(ordered.softmax(dim=-1), params.top_p)
    if params.min_p > 0:
        limit = params.min_p * distribution.amax(dim=-1, keepdim=True)
        distribution = distribution.masked_fill(distribution < limit, 0.0)
        distribution = distribution / distribution.sum(dim=-1, keepdim=True)
    if order is not None:
        distribution = torch.zeros_like(logits).scatter(-1, order, distribution)
    return _apply_typical_p(distribution, params.typical_p)


def _first(ordered: Tensor, mass: float) -> Tensor:
    """The first probabilities (..., K) that sum to `mass`; 0 instead of the others."""
    if mass == 1:
        return ordered
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= mass, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def _apply_typical_p(distribution: Tensor, mass: float) -> Tensor:
    if mass == 1:
        return distribution
    information = -distribution.clamp(min=SMALLEST_TEMPERATURE).log()
    entropy = (distribution * information).sum(dim=-1, keepdim=True)
    order = (information - entropy).abs().argsort(dim=-1, stable=True)
    kept = _first(distribution.gather(-1, order), mass)
    return torch.zeros_like(distribution).scatter(-1, order, kept)


def sample_from_probs(distribution: Tensor, uniform: Tensor) -> Tensor:
    """One index (...) from each distribution (..., K), by inversion of its cumulative distribution.

    Indices of probability 0 are never sampled. `uniform` (...) is in [0, 1).
    """
    cumulative = distribution.cumsum(dim=-1)
    # Rounding may leave the total a little off 1: the number is scaled, and kept below it.
    total = cumulative[..., -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform.to(total) * total, below)
    return torch.searchsorted(cumulative, target[..., None], right=True)[..., 0]


def random_keys(seed: int, images: Tensor) -> Tensor:
    """One key of the random numbers for each number of an image (B,), int64; any seed."""
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return _mix(images * GOLDEN_RATIO + signed)


def uniform(keys: Tensor, token: Tensor | int) -> Tensor:
    """A number in [0, 1), float32, for each key (B,) and the number of a token, (1,) or (B,).

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a hash of seed, image and token, so that a
    sample depends on nothing else: not on the batch, nor on the tokens before.
    """
    steps = (torch.as_tensor(token, device=keys.device) + 1) * GOLDEN_RATIO  # modulo 2^64
    return _shifted(_mix(keys + steps), 40).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in zip(SHIFTS, FACTORS, strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; that of signed numbers is arithmetic."""
    return x >> bits & (1 << 64 - bits) - 1
