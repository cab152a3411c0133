"""Numbers that trainings and evaluations share."""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1] with this mean squared error."""
    return -10 * math.log10(max(mse, 1e-20))


def squared_error(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error of each pair of images on the scale [0, 1].

    Args:
        images, others: (B, C, H, W) in [-1, 1].

    Returns:
        (B,), float32.
    """
    return (images.float() - others.float()).square().mean(dim=(1, 2, 3)) / 4


def entropy(counts: Tensor) -> float:
    """Entropy in bits of the distribution that `counts` (any shape, not negative) make."""
    shares = counts.double().flatten() / counts.sum()
    return -float(torch.special.xlogy(shares, shares).sum()) / math.log(2)


def codebook_metrics(counts: Tensor) -> dict[str, float]:
    """From how often each code occurs, (K,): usage in percent, and perplexity in [1, K]."""
    return {
        "codebook_usage": 100 * float((counts > 0).float().mean()),
        "perplexity": 2 ** entropy(counts),
    }


def unigram_bits(counts: Tensor, held_out: Tensor) -> float:
    """Bits per token of `held_out` counts (K,) under the distribution of `counts` (K,).

    One is added to every count (Laplace), so that an unseen index has a price.
    """
    probabilities = (counts.double() + 1) / (counts.sum() + len(counts))
    return float(-(held_out.double() * probabilities.log2()).sum() / held_out.sum())


class Averages:
    """Means of named numbers since the last look; they stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}  # not every step has every number
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """Count time from now on; what happened since the last step was no training."""
        self._since = time.perf_counter()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take in the values of one step."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means and `steps_per_second`, after which everything starts anew."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        means["steps_per_second"] = self._steps / (time.perf_counter() - self._since)
        self._sums, self._counts, self._steps = {}, {}, 0
        self.restart()
        return means
