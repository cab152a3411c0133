"""Are samples copies of training images? How near they come, beside how near new images come."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from utils.evaluation import bootstrap
from utils.evaluation.bootstrap import Figure
from utils.evaluation.neighbours import nearest

NEIGHBOURS = 10
COPY = 0.01  # of new images count as copies, too


class Closest(NamedTuple):
    """The nearest training image of each of N images.

    Attributes:
        distances: (N,).
        ratios: (N,), of the distance to the mean distance of the 10 nearest training images. It
            is 0 for a copy, and moves with the neighbourhood: plain images, which all lie close
            together, are no more suspicious than others.
        rows: (N,), which training image it is.
    """

    distances: Tensor
    ratios: Tensor
    rows: Tensor


def closest(images: Tensor, training: Tensor) -> Closest:
    """Find the nearest training image of each image.

    Args:
        images: (N, D), pixels or features.
        training: (M, D), M of 2 or more.
    """
    found = nearest(images, training, min(NEIGHBOURS, len(training)))
    mean = found.distances.mean(dim=1).clamp(min=1e-12)
    return Closest(found.distances[:, 0], found.distances[:, 0] / mean, found.rows[:, 0])


def threshold(new: Closest) -> float:
    """The ratio up to which an image counts as a copy: that of the nearest 1 % of new images."""
    return float(new.ratios.kthvalue(math.ceil(COPY * len(new.ratios))).values)


def figures(found: Closest, space: str, limit: float, weights: Tensor) -> dict[str, Figure]:
    """Mean distance to the nearest training image, and the share of copies.

    Args:
        found: of `closest`.
        space: what the distances are in, for the names.
        limit: of `threshold`.
        weights: of `bootstrap.resample`, (R, N).
    """
    return {
        f"nearest_{space}": bootstrap.mean(found.distances, weights, bootstrap.POSITIVE),
        f"copies_{space}": bootstrap.mean(found.ratios <= limit, weights),
    }


def suspects(found: Closest, count: int) -> Tensor:
    """The images that are most likely copies, most likely first, (count,)."""
    return torch.argsort(found.ratios, stable=True)[:count]
