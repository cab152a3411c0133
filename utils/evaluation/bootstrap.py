"""Confidence intervals: how far a figure would move with other images of the same kind."""

from typing import NamedTuple

import torch
from torch import Tensor

REPLICATES = 100
WIDTH = 1.96  # standard errors to each side of a figure: 95 % of a normal distribution


class Figure(NamedTuple):
    """A number, and the standard deviation that it has over the bootstrap's resamples.

    The interval is `value` plus and minus 1.96 standard errors. Quantiles of the resamples would
    not do: drawn with replacement, sets of images are further apart than the originals, and have
    fewer codes in use.
    """

    value: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end, 95 %."""
        spread = WIDTH * self.standard_error
        return self.value - spread, self.value + spread


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


def figure(estimates: Tensor) -> Figure:
    """From the estimate of each row of `resample`, (1 + replicates,)."""
    return Figure(float(estimates[0]), float(estimates[1:].double().std()))


def mean(values: Tensor, weights: Tensor) -> Figure:
    """The mean of one number an image.

    Args:
        values: (N,).
        weights: of `resample`, (1 + replicates, N).
    """
    return figure(weights.double() @ values.to(weights.device, torch.double) / len(values))
