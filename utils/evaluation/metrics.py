"""Metrics with confidence intervals: of pairs of images and of codebook indices.

`IMAGE_METRICS` and `CODE_METRICS` are iterated over by trainings, evaluate.py, its reports, MLflow
and --compare: a new metric is one function and one row here, or in `distances.SET_METRICS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.cli import UserError

REPLICATES = 100  # bootstrap resamples
WIDTH = 1.96  # standard errors on each side of an estimate: 95 % of a normal distribution
MAX_PAIRS = 1 << 25  # further pairs would not change a bigram baseline
SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5  # pixels

Bounds = tuple[float, float]
ANY, POSITIVE, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)


# --- estimates and their intervals --------------------------------------------------------------


class Estimate(NamedTuple):
    """A metric, and its standard deviation over the bootstrap resamples.

    Quantiles of the resamples are not used: sets that are sampled with replacement have larger
    distances and fewer codes in use than the original sets.
    """

    value: float
    standard_error: float
    bounds: Bounds = ANY

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: the value -+ 1.96 standard errors, cut at the bounds of the metric."""
        spread = WIDTH * self.standard_error
        return max(self.bounds[0], self.value - spread), min(self.bounds[1], self.value + spread)


def resample(count: int, seed: int, replicates: int = REPLICATES) -> Tensor:
    """How often each image occurs in each bootstrap resample (Efron, 1979): (R, count), float32.

    R is 1 + replicates; the first row is ones, the original images.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(1 + replicates, count)
    for row in weights[1:]:
        row[:] = torch.randint(count, (count,), generator=generator).bincount(minlength=count)
    return weights


def estimate(replicates: Tensor, bounds: Bounds = ANY) -> Estimate:
    """From the value of a metric for each row of `resample`, (R,)."""
    return Estimate(float(replicates[0]), float(replicates[1:].double().std()), bounds)


def mean(values: Tensor, weights: Tensor, bounds: Bounds = ANY) -> Estimate:
    """The mean of one number per image (N,), by weights (R, N) of `resample`.

    The mean of booleans is a share from 0 to 1.
    """
    bounds = SHARE if values.dtype == torch.bool else bounds
    means = weights.double() @ values.to(weights.device, torch.double) / len(values)
    return estimate(means, bounds)


# --- pairs of images ----------------------------------------------------------------------------


def squared_error(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error on the scale [0, 1] of pairs (B, C, H, W) in [-1, 1]: (B,), float32."""
    return (images.float() - others.float()).square().mean(dim=(1, 2, 3)) / 4


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1] with this mean squared error."""
    return -10 * math.log10(max(mse, 1e-20))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of pairs (B, C, H, W) in [-1, 1]: (B,), float32.

    On the scale [0, 1]; 1 for equal images. Gaussian window of 11 pixels and deviation 1.5, inside
    the image only; for smaller images, the window has the largest odd side that fits.
    """
    side = min(SSIM_WINDOW, *images.shape[2:])
    side -= 1 - side % 2  # odd, so that the window has a middle
    place = torch.arange(side, device=images.device)
    window = (-(place - place.float().mean()).square() / (2 * SSIM_DEVIATION**2)).exp()
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, -1, 1))
        return F.conv2d(x, window.view(1, 1, 1, -1)).unflatten(0, images.shape[:2]).squeeze(2)

    x, y = images.float() / 2, others.float() / 2  # around 0, so that little cancels in variances
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    cov = blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5  # the luminances, in [0, 1]
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * cov + 0.03**2) / (var_x + var_y + 0.03**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


class ImageMetric(NamedTuple):
    """Two batches (B, C, H, W) in [-1, 1] -> one number per pair (B,), and its range."""

    compute: Callable[[Tensor, Tensor], Tensor]
    bounds: Bounds = POSITIVE
    higher_is_better: bool = False


IMAGE_METRICS: dict[str, ImageMetric] = {
    "mse": ImageMetric(squared_error),
    "ssim": ImageMetric(ssim, (-1.0, 1.0), higher_is_better=True),
}


def image_metrics(images: Tensor, others: Tensor) -> dict[str, Tensor]:
    """All of `IMAGE_METRICS` for each pair of images, (B,) each."""
    return {name: metric.compute(images, others) for name, metric in IMAGE_METRICS.items()}


def mean_errors(
    errors: Mapping[str, Tensor], weights: Tensor, table: Mapping[str, ImageMetric] = IMAGE_METRICS
) -> dict[str, Estimate]:
    """The mean of each image metric (N,), and the PSNR of the mean squared error in dB."""
    means = {name: mean(part, weights, table[name].bounds) for name, part in errors.items()}
    mse = (weights.double() @ errors["mse"].double() / len(errors["mse"])).clamp(min=1e-20)
    return {"mse": means.pop("mse"), "psnr": estimate(-10 * mse.log10()), **means}


# --- codebook indices ---------------------------------------------------------------------------


def entropy(shares: Tensor) -> Tensor:
    """Entropy in bits of each row of shares (R, K)."""
    return -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(2)


CODE_METRICS: dict[str, Callable[[Tensor], Tensor]] = {  # shares of the codes (R, K) -> (R,)
    "codebook_usage": lambda shares: 100 * (shares > 0).double().mean(dim=1),  # percent
    "perplexity": lambda shares: 2 ** entropy(shares),  # in [1, K]
}


def codebook_metrics(counts: Tensor) -> dict[str, float]:
    """`CODE_METRICS` from how often each code occurs, (K,)."""
    shares = (counts.double() / counts.sum())[None]
    return {name: float(compute(shares)) for name, compute in CODE_METRICS.items()}


def index_frequencies(grids: Tensor, codebook_size: int, depth: int, weights: Tensor) -> Tensor:
    """The share of each index in each resample: (R, codebook_size * depth), float64.

    Grids are (N, h, w), or (N, h, w, depth), where each depth has its own indices.
    """
    grids = grids.long().cpu()
    if depth > 1:
        grids = grids + codebook_size * torch.arange(depth)
    flat, size = grids.flatten(1), codebook_size * depth
    counts = [
        torch.bincount(flat.flatten(), row.double().repeat_interleave(flat.shape[1]), size)
        for row in weights.cpu()
    ]
    return torch.stack(counts) / flat.numel()


def code_estimates(shares: Tensor, tokens_per_pixel: float) -> dict[str, Estimate]:
    """`CODE_METRICS` of `index_frequencies`, and bits per pixel of an ideal code for indices."""
    bounds = {"codebook_usage": (0.0, 100.0), "perplexity": (1.0, float(shares.shape[1]))}
    found = {
        name: estimate(compute(shares), bounds.get(name, ANY))
        for name, compute in CODE_METRICS.items()
    }
    return found | {"entropy_per_pixel": estimate(entropy(shares) * tokens_per_pixel, POSITIVE)}


def token_divergence(shares: Tensor, others: Tensor) -> Estimate:
    """Jensen-Shannon divergence in bits, from 0 for equal frequencies to 1 for disjoint ones."""
    middle = entropy((shares + others) / 2)
    return estimate(middle - (entropy(shares) + entropy(others)) / 2, SHARE)


def unigram_bits(counts: Tensor, held_out: Tensor) -> float:
    """Bits per token of `held_out` counts (K,) under the distribution of `counts` (K,).

    One is added to every count (Laplace), so that an index without occurrences has finite bits.
    """
    probabilities = (counts.double() + 1) / (counts.sum() + len(counts))
    return float(-(held_out.double() * probabilities.log2()).sum() / held_out.sum())


def bigram_bits(grids: Tensor, held_out: Tensor, codebook_size: int) -> float:
    """Bits per token of held-out grids if each index is predicted from the previous one alone.

    Counts of the first 2^25 pairs in raster order, smoothed by the unigram distribution in
    proportion to the number of distinct successors (Witten and Bell, 1991). The first index has
    the unigram alone. Grids are (N, h, w) and (M, h, w).
    """
    grids, held_out = (x.flatten(1)[: max(1, MAX_PAIRS // x[0].numel())] for x in (grids, held_out))
    counts = torch.bincount(grids.flatten().long(), minlength=codebook_size)
    unigram = (counts.double() + 1) / (counts.sum() + codebook_size)
    pairs = grids[:, :-1].long() * codebook_size + grids[:, 1:].long()
    observed, times = pairs.flatten().unique(return_counts=True)  # sorted
    previous = torch.div(observed, codebook_size, rounding_mode="floor")
    total = torch.zeros(codebook_size, dtype=torch.double)
    total.index_add_(0, previous, times.double())
    successors = torch.bincount(previous, minlength=codebook_size).double()

    first, second = held_out[:, :-1].flatten().long(), held_out[:, 1:].flatten().long()
    bits = -unigram[held_out[:, 0].long()].log2().sum()
    if len(observed):
        wanted = first * codebook_size + second
        place = torch.searchsorted(observed, wanted).clamp(max=len(observed) - 1)
        found = torch.where(observed[place] == wanted, times[place], 0).double()
        weight = successors[first].clamp(min=1)  # after an index without successors: the unigram
        likely = (found + weight * unigram[second]) / (total[first] + weight)
        bits = bits - likely.log2().sum()
    return float(bits) / held_out.numel()


def baselines(train: Tensor, val: Tensor, codebook_size: int, depth: int) -> tuple[float, float]:
    """Unigram and bigram bits per token of validation grids: what a GPT has to improve on.

    Grids are (N, h, w), or (N, h, w, depth) for a depth above 1, where each depth has its own
    statistics. The unigram does not spend bits on the depth, which is known at each token.
    """
    size = codebook_size * depth
    if depth > 1:
        train, val = (x.int() + codebook_size * torch.arange(depth) for x in (train, val))
    counts = [torch.bincount(grids.flatten().long(), minlength=size) for grids in (train, val)]
    return unigram_bits(*counts) - math.log2(depth), bigram_bits(train, val, size)


# --- the best model -----------------------------------------------------------------------------

HIGHER_IS_BETTER = {"psnr", "label_agreement", *CODE_METRICS} | {
    name for name, metric in IMAGE_METRICS.items() if metric.higher_is_better
}


def sign_of(metric: str, measured: Sequence[str]) -> int:
    """1 for a validation metric that is better when lower, -1 for one that is better when higher.

    Raises:
        UserError: the metric is not among those measured.
    """
    if metric not in measured:
        raise UserError(f"--best_metric {metric} is not measured here; use {', '.join(measured)}")
    return -1 if metric in HIGHER_IS_BETTER else 1
