"""Numbers that trainings and evaluations share."""

import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.cli import UserError

MAX_PAIRS = 1 << 25  # more tell a bigram baseline nothing new
HIGHER_IS_BETTER = ("psnr", "ssim", "codebook_usage", "perplexity", "label_agreement")
SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5  # pixels


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


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al., 2004), on the scale [0, 1].

    Gaussian window of 11 pixels and deviation 1.5, inside the image only; images of fewer than 11
    pixels a side have a window of the largest odd side that they hold.

    Args:
        images, others: (B, C, H, W) in [-1, 1].

    Returns:
        (B,), float32, in [-1, 1]; 1 for equal images.
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


def bigram_bits(grids: Tensor, held_out: Tensor, codebook_size: int) -> float:
    """Bits per token of held-out grids if each index is predicted from the one before it alone.

    Counts of pairs in raster order, smoothed by the unigram distribution as much as new indices
    were seen after this one (Witten and Bell, 1991). The first cell has the unigram alone.

    Args:
        grids: (N, h, w), of which the first 2^25 pairs count.
        held_out: (M, h, w).
        codebook_size: K.
    """
    grids, held_out = (x.flatten(1)[: max(1, MAX_PAIRS // x[0].numel())] for x in (grids, held_out))
    counts = torch.bincount(grids.flatten().long(), minlength=codebook_size)
    unigram = (counts.double() + 1) / (counts.sum() + codebook_size)
    pairs = grids[:, :-1].long() * codebook_size + grids[:, 1:].long()
    seen, times = pairs.flatten().unique(return_counts=True)  # seen is sorted
    before = torch.div(seen, codebook_size, rounding_mode="floor")
    total = torch.zeros(codebook_size, dtype=torch.double)
    total.index_add_(0, before, times.double())
    kinds = torch.bincount(before, minlength=codebook_size).double()

    first, second = held_out[:, :-1].flatten().long(), held_out[:, 1:].flatten().long()
    bits = -unigram[held_out[:, 0].long()].log2().sum()
    if len(seen):
        wanted = first * codebook_size + second
        place = torch.searchsorted(seen, wanted).clamp(max=len(seen) - 1)
        found = torch.where(seen[place] == wanted, times[place], 0).double()
        weight = kinds[first].clamp(min=1)  # after an index that never came before: the unigram
        likely = (found + weight * unigram[second]) / (total[first] + weight)
        bits = bits - likely.log2().sum()
    return float(bits) / held_out.numel()


def sign_of(metric: str, known: Sequence[str]) -> int:
    """1 for a validation figure that is better when lower, -1 for one that is better when higher.

    Raises:
        UserError: it is none of those that are known here.
    """
    if metric not in known:
        raise UserError(f"--best_metric {metric} is not measured here; use {', '.join(known)}")
    return -1 if metric in HIGHER_IS_BETTER else 1


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

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training needs to log the same means."""
        state = {"steps": torch.tensor(self._steps)}
        state["seconds"] = torch.tensor(time.perf_counter() - self._since, dtype=torch.double)
        for name, value in self._sums.items():
            exact = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.double)
            state |= {f"sum.{name}": exact, f"count.{name}": torch.tensor(self._counts[name])}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            KeyError: it was taken of something else.
        """
        self._steps = int(state["steps"])
        self._since = time.perf_counter() - float(state["seconds"])
        names = [key.removeprefix("sum.") for key in state if key.startswith("sum.")]
        self._sums = {name: state[f"sum.{name}"] for name in names}
        self._counts = {name: int(state[f"count.{name}"]) for name in names}
