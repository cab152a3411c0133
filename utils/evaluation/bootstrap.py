"""Confidence intervals: how far a figure would move with other images of the same kind."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

REPLICATES = 100
WIDTH = 1.96  # standard errors to each side of a figure: 95 % of a normal distribution

Bounds = tuple[float, float]
ANY, POSITIVE, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)


class Figure(NamedTuple):
    """A number, and the standard deviation that it has over the bootstrap's resamples.

    The interval is `value` plus and minus 1.96 standard errors, cut where it would leave the
    `bounds` of what such a figure can be. Quantiles of the resamples would not do: drawn with
    replacement, sets of images are further apart than the originals, and have fewer codes in use.
    """

    value: float
    standard_error: float
    bounds: Bounds = ANY

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end, 95 %."""
        spread = WIDTH * self.standard_error
        low, high = self.bounds
        return max(low, self.value - spread), min(high, self.value + spread)


def resample(count: int, seed: int, replicates: int = REPLICATES) -> Tensor:
    """How often each of `count` images is drawn in each resample (Efron, 1979).

    Returns:
        (1 + replicates, count), float32. The first row is ones: the images as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(1 + replicates, count)
    for row in weights[1:]:
        row[:] = torch.randint(count, (count,), generator=generator).bincount(minlength=count)
    return weights


def figure(estimates: Tensor, bounds: Bounds = ANY) -> Figure:
    """From the estimate of each row of `resample`, (1 + replicates,)."""
    return Figure(float(estimates[0]), float(estimates[1:].double().std()), bounds)


def mean(values: Tensor, weights: Tensor, bounds: Bounds = ANY) -> Figure:
    """The mean of one number an image; of booleans it is a share, from 0 to 1.

    Args:
        values: (N,).
        weights: of `resample`, (1 + replicates, N).
        bounds: between which each number is.
    """
    bounds = SHARE if values.dtype == torch.bool else bounds
    means = weights.double() @ values.to(weights.device, torch.double) / len(values)
    return figure(means, bounds)
