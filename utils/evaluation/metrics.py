"""Metrics with confidence intervals: of pairs of images, two sets of features, codebook indices.

A new metric is one function and one row in `IMAGE_METRICS` or `CODE_METRICS`, or one line in
`distances.set_metrics`. Trainings, evaluate.py, MLflow and --compare iterate over these.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TOKENS = 1 << 25  # more would not change a baseline
REPLICATES, FRECHET_REPLICATES = 100, 50  # bootstrap resamples
WIDTH = 1.96  # standard errors on each side: 95 % of a normal distribution
SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5  # pixels
Bounds = tuple[float, float]
Weights = tuple[Tensor, Tensor]  # of `resample`, one for each of two sets
ANY, POSITIVE, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)


class Estimate(NamedTuple):
    """A metric, and its standard deviation over the bootstrap resamples.

    Their quantiles are not used: resampled sets have larger distances and fewer codes in use.
    """

    value: float
    standard_error: float
    bounds: Bounds = ANY

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: the value -+ 1.96 standard errors, cut at the bounds of the metric."""
        (low, high), spread = self.bounds, WIDTH * self.standard_error
        return max(low, self.value - spread), min(high, self.value + spread)


def resample(count: int, seed: int, replicates: int = REPLICATES) -> Tensor:
    """How often each image occurs in each bootstrap resample (Efron, 1979): (R, count), float32.

    R is 1 + replicates; the first row is ones, the original images.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(1 + replicates, count)
    for row in weights[1:]:
        chosen = torch.randint(count, (count,), generator=generator)
        row[:] = chosen.bincount(minlength=count)
    return weights


def estimate(replicates: Tensor, bounds: Bounds = ANY) -> Estimate:
    """From the value of a metric for each row of `resample`, (R,)."""
    return Estimate(float(replicates[0]), float(replicates[1:].double().std()), bounds)


def mean(values: Tensor, weights: Tensor, bounds: Bounds = ANY) -> Estimate:
    """The mean of one number or boolean per image (N,), by weights (R, N) of `resample`."""
    bounds = SHARE if values.dtype == torch.bool else bounds
    means = weights.double() @ values.to(weights.device, torch.double) / len(values)
    return estimate(means, bounds)


def squared_error(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error on the scale [0, 1] of pairs (B, C, H, W) in [-1, 1]: (B,), float32."""
    return (images.float() - others.float()).square().mean(dim=(1, 2, 3)) / 4


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1] with this mean squared error."""
    return -10 * math.log10(max(mse, 1e-20))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of pairs (B, C, H, W) in [-1, 1]: (B,), float32.

    On the scale [0, 1], by a Gaussian window inside the image, or the largest odd one that fits.
    """
    side = min(SSIM_WINDOW, *images.shape[2:])
    side -= 1 - side % 2  # odd, so that the window has a middle
    place = torch.arange(side, device=images.device)
    window = (-(place - place.float().mean()).square() / (2 * SSIM_DEVIATION**2)).exp()
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, -1, 1))
        return F.conv2d(x, window.view(1, 1, 1, -1)).unflatten(0, images.shape[:2]).squeeze(2)

    x, y = images.float() / 2, others.float() / 2  # around 0: little cancels in variances
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

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """(B,); of RGBA images, the mean over their composites on black and on white."""
        pairs = zip(composites(images), composites(others), strict=True)
        return torch.stack([self.compute(*pair) for pair in pairs]).mean(dim=0)


def composites(images: Tensor) -> list[Tensor]:
    """Premultiplied RGBA images (B, 4, H, W) on black and on white, (B, 3, H, W) each.

    Images without alpha (B, C, H, W) are returned as they are.
    """
    colours, alpha = images[:, :3].float(), images[:, 3:].float()
    return [images] if images.shape[1] < 4 else [colours, (colours + 1 - alpha).clamp(-1, 1)]


IMAGE_METRICS: dict[str, ImageMetric] = {
    "mse": ImageMetric(squared_error),
    "ssim": ImageMetric(ssim, (-1.0, 1.0), higher_is_better=True),
}


def image_metrics(images: Tensor, others: Tensor) -> dict[str, Tensor]:
    """All of `IMAGE_METRICS` for each pair of images, (B,) each."""
    return {name: metric(images, others) for name, metric in IMAGE_METRICS.items()}


def mean_errors(
    errors: Mapping[str, Tensor], weights: Tensor, table: Mapping[str, ImageMetric] = IMAGE_METRICS
) -> dict[str, Estimate]:
    """The mean of each image metric (N,), and the PSNR of the mean squared error in dB."""
    means = {name: mean(x, weights, table[name].bounds) for name, x in errors.items()}
    mse = weights.double() @ errors["mse"].double() / len(errors["mse"])
    found = estimate(-10 * mse.clamp(min=1e-20).log10())
    return {"mse": means.pop("mse"), "psnr": found, **means}


def _moments(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), each `weights` (N,) times."""
    return weights @ features / weights.sum(), features.T.cov(fweights=weights.long())


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of symmetric matrices only."""
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt()  # cov_1 = root root^T
    product = torch.linalg.eigvalsh(root.T @ cov_2 @ root)  # has the eigenvalues of C1 C2
    cross = product.clamp(min=0).sqrt().sum()
    traces = cov_1.trace() + cov_2.trace()
    distance = (mean_1 - mean_2).square().sum() + traces - 2 * cross
    return distance.clamp(min=0)  # rounding may leave equal sets a little below


def frechet_distance(first: Tensor, second: Tensor, weights: Weights) -> Estimate:
    """Frechet distance of two sets as Gaussians (arXiv 1706.08500): with Inception, the FID.

    Of features (N, D) and (M, D) by the first 51 rows of the weights (R, N) and (R, M). It falls
    with the number of images, also for sets of the same kind: compare equal counts.
    """
    first, second = first.double(), second.double()
    count = 1 + FRECHET_REPLICATES
    found = [
        _frechet(_moments(first, a), _moments(second, b))
        for a, b in zip(*(part[:count].to(first) for part in weights), strict=True)
    ]
    return estimate(torch.stack(found), POSITIVE)


def entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of each row of counts or shares (R, K)."""
    shares = counts / counts.sum(dim=1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(2)


def codebook_usage(counts: Tensor) -> Tensor:
    """The percentage of codes that occur, of K or of all indices where these are fewer: (R,)."""
    possible = counts.sum(dim=1).clamp(1, counts.shape[1])
    return 100 * (counts > 0).double().sum(dim=1) / possible


# Counts of the codes (R, K) -> (R,).
CODE_METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "codebook_usage": codebook_usage,
    "perplexity": lambda counts: 2 ** entropy(counts),  # from 1 to K
}
# 1 for a metric of which lower is better, -1 for one of which higher is better.
SIGNS = {name: -1 if metric.higher_is_better else 1 for name, metric in IMAGE_METRICS.items()}
SIGNS |= dict.fromkeys(("psnr", *CODE_METRICS), -1)


def codebook_metrics(counts: Tensor) -> dict[str, float]:
    """`CODE_METRICS` from how often each code occurs, (K,)."""
    counts = counts.double()[None]
    return {name: float(compute(counts)) for name, compute in CODE_METRICS.items()}


def index_counts(grids: Tensor, codebook_size: int, depth: int, weights: Tensor) -> Tensor:
    """How often each index occurs in each resample: (R, codebook_size * depth), float64.

    Grids are (N, h, w), or (N, h, w, depth), where each depth has its own indices.
    """
    size = codebook_size * depth
    flat = with_depth(grids.cpu(), codebook_size, depth).flatten(1)
    repeated = (row.double().repeat_interleave(flat.shape[1]) for row in weights.cpu())
    return torch.stack([torch.bincount(flat.flatten(), row, size) for row in repeated])


def code_estimates(counts: Tensor, tokens_per_pixel: float) -> dict[str, Estimate]:
    """`CODE_METRICS` of `index_counts`, and bits per pixel of an ideal code for indices."""
    values = {name: compute(counts) for name, compute in CODE_METRICS.items()}
    values["entropy_per_pixel"] = entropy(counts) * tokens_per_pixel
    return {name: estimate(value, POSITIVE) for name, value in values.items()}


def token_divergence(counts: Tensor, others: Tensor) -> Estimate:
    """Jensen-Shannon divergence in bits, from 0 for equal frequencies to 1 for disjoint ones."""
    shares, others = (x / x.sum(dim=1, keepdim=True) for x in (counts, others))
    middle = entropy((shares + others) / 2)
    return estimate(middle - (entropy(shares) + entropy(others)) / 2, SHARE)


def with_depth(grids: Tensor, codebook_size: int, depth: int) -> Tensor:
    """Grids whose depths, where there are several, have their own indices, int64."""
    return grids.long() + codebook_size * torch.arange(depth) if depth > 1 else grids.long()


def baselines(train: Tensor, val: Tensor, codebook_size: int, depth: int) -> tuple[float, float]:
    """Unigram and bigram bits per token of validation grids: what a GPT has to improve on.

    The unigram adds one to each count of an index in the training grids (Laplace). The bigram
    predicts each index from the previous one in raster order, smoothed by the unigram in proportion
    to the number of distinct successors (Witten and Bell, 1991). Grids are (N, h, w), or
    (N, h, w, depth): each depth has its own statistics, and no bits are spent on the depth itself.
    """
    size, rows = codebook_size * depth, max(1, MAX_TOKENS // train[0].numel())
    grids = (with_depth(x[:rows], codebook_size, depth) for x in (train, val))
    train, val = (x.flatten(1) for x in grids)
    counts = torch.bincount(train.flatten(), minlength=size)
    unigram = (counts.double() + 1) / (counts.sum() + size)

    pairs = train[:, :-1] * size + train[:, 1:]
    observed, times = pairs.unique(return_counts=True)  # sorted
    previous = observed // size
    total = torch.bincount(previous, times.double(), size)
    successors = torch.bincount(previous, minlength=size).double()
    first, second = val[:, :-1].flatten(), val[:, 1:].flatten()
    wanted = first * size + second
    place = torch.searchsorted(observed, wanted).clamp(max=len(observed) - 1)
    found = torch.where(observed[place] == wanted, times[place], 0).double()
    weight = successors[first].clamp(min=1)  # without successors: the unigram
    bigram = (found + weight * unigram[second]) / (total[first] + weight)
    bits = unigram[val[:, 0]].log2().sum() + bigram.log2().sum()
    unigram_bits = float(-unigram[val].log2().mean()) - math.log2(depth)
    return unigram_bits, float(-bits) / val.numel()
