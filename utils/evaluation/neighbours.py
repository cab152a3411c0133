"""Nearest neighbours among many images, by matrix products of a part at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.evaluation import bootstrap
from utils.evaluation.bootstrap import Figure

QUERIES, REFERENCES = 2048, 8192  # rows of a block of distances
PRECISION_K, DENSITY_K = 3, 5  # neighbours, of the papers


class Neighbours(NamedTuple):
    """Euclidean distances (N, k), ascending, and which rows (N, k) of the references they are."""

    distances: Tensor
    rows: Tensor


def _centre(images: Tensor) -> Tensor:
    """The mean (D,): around it little cancels in the products."""
    return (images.sum(dim=0, dtype=torch.double) / len(images)).float()


def _squared(part: Tensor, others: Tensor, centre: Tensor) -> Tensor:
    """Squared distances (n, m) of (n, D) and (m, D), of any type, in float32."""
    part, others = part.float() - centre, others.float() - centre
    norms = part.square().sum(dim=1, keepdim=True) + others.square().sum(dim=1)
    return torch.addmm(norms, part, others.T, alpha=-2)


def nearest(queries: Tensor, references: Tensor, k: int = 1) -> Neighbours:
    """The k nearest references of each query.

    The products choose; the distances given are computed anew without cancellation, so that a
    copy has exactly 0.

    Args:
        queries: (N, D), of any type.
        references: (M, D), M at least k.
    """
    centre = _centre(references)
    distances, rows = [], []
    for part in queries.split(QUERIES):
        found, places = [], []
        for start in range(0, len(references), REFERENCES):
            squared = _squared(part, references[start : start + REFERENCES], centre)
            best = squared.topk(min(k, squared.shape[1]), dim=1, largest=False)
            found.append(best.values)
            places.append(best.indices + start)
        chosen = torch.cat(found, dim=1).topk(k, dim=1, largest=False).indices
        chosen = torch.cat(places, dim=1).gather(1, chosen)
        exact = [(part.float() - references[row].float()).norm(dim=1) for row in chosen.T]
        exact, order = torch.stack(exact, dim=1).sort(dim=1)
        distances.append(exact)
        rows.append(chosen.gather(1, order))
    return Neighbours(torch.cat(distances), torch.cat(rows))


def manifold_metrics(
    real: Tensor, samples: Tensor, weights: tuple[Tensor, Tensor]
) -> dict[str, Figure]:
    """How much of the samples lies among the real images, and the reverse.

    Around each image lies a ball that reaches to its k-th neighbour in its own set. Precision
    is the share of the samples in a real ball, recall that of real images in a ball of a sample
    (k = 3, arXiv 1904.06991); density the mean number of real balls that a sample is in, over k;
    coverage the share of the real balls with a sample in them (k = 5, arXiv 2002.09797). A
    resample draws images, not balls.

    Args:
        real, samples: features (N, D) and (M, D), each of more than 5 images.
        weights: (R, N) and (R, M).
    """
    real_radii = nearest(real, real, DENSITY_K + 1).distances  # the nearest is the image itself
    radii = nearest(samples, samples, PRECISION_K + 1).distances[:, PRECISION_K]
    narrow, wide = real_radii[:, PRECISION_K].square(), real_radii[:, DENSITY_K].square()
    centre = _centre(real)
    inside, depth = [], []
    reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = reached.clone()
    for part, radius in zip(samples.split(QUERIES), radii.split(QUERIES), strict=True):
        squared = _squared(part, real, centre)
        inside.append((squared <= narrow).any(dim=1))
        within = squared <= wide
        depth.append(within.sum(dim=1) / DENSITY_K)
        covered |= within.any(dim=0)
        reached |= (squared <= radius.square()[:, None]).any(dim=0)
    return {
        "precision": bootstrap.mean(torch.cat(inside), weights[1]),
        "recall": bootstrap.mean(reached, weights[0]),
        "density": bootstrap.mean(torch.cat(depth), weights[1], bootstrap.POSITIVE),
        "coverage": bootstrap.mean(covered, weights[0]),
    }
