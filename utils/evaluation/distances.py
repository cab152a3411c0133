"""Metrics of a set of images beside real images, from the features of both in some network.

All sums are in float64 on the device of the features.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.evaluation.features import Features, label_agreement
from utils.evaluation.metrics import POSITIVE, Estimate, Weights, estimate, frechet_distance, mean

CHUNK = 2048  # rows of a kernel matrix at a time
QUERIES, BLOCK = 2048, 1 << 26  # rows of a block of distances, and its numbers
PRECISION_K, DENSITY_K = 3, 5  # neighbours, of the papers
NEIGHBOURS = 10
COPY = 0.01  # share of new images that count as copies


def kernel_distance(first: Tensor, second: Tensor, weights: Weights) -> Estimate:
    """Squared maximum mean discrepancy (arXiv 1801.01401): with Inception, the KID.

    The unbiased estimate from all pairs of images, by the kernel (x y / D + 1)^3. Pairs of an
    image with itself do not count, nor pairs of its repetitions in a resample. Features are
    (N, D) and (M, D), weights (R, N) and (R, M).
    """
    first, second = first.double(), second.double()
    w_1, w_2 = (part.to(first) for part in weights)

    def within(x: Tensor, w: Tensor) -> Tensor:
        own = (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
        pairs = w.sum(dim=1).square() - w.square().sum(dim=1)
        return (_kernel_sum(x, x, w, w) - w.square() @ own) / pairs

    between = _kernel_sum(first, second, w_1, w_2) / (w_1.sum(dim=1) * w_2.sum(dim=1))
    return estimate(within(first, w_1) + within(second, w_2) - 2 * between)


def _kernel_sum(x: Tensor, y: Tensor, w_x: Tensor, w_y: Tensor) -> Tensor:
    """sum_ij w_x[i] k(x_i, y_j) w_y[j] for each row of the weights, (R,)."""
    total = torch.zeros(len(w_x), dtype=x.dtype, device=x.device)
    for part, w in zip(x.split(CHUNK), w_x.split(CHUNK, dim=1), strict=True):
        kernel = (part @ y.T / x.shape[1] + 1).pow_(3)  # (n, M)
        total += ((w @ kernel) * w_y).sum(dim=1)
    return total


def class_score(logits: Tensor, weights: Tensor) -> Estimate:
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498): with Inception, the Inception Score.

    Of the logits (N, classes) of all images at once and not of ten parts.
    """
    logs = logits.double().log_softmax(dim=1)
    shares = weights.to(logs) / len(logs)
    conditional = shares @ (logs.exp() * logs).sum(dim=1)
    marginal = shares @ logs.exp()
    scores = (conditional - torch.special.xlogy(marginal, marginal).sum(dim=1)).exp()
    return estimate(scores, (1.0, float(logits.shape[1])))


def _distances(part: Tensor, others: Tensor, centre: Tensor) -> Tensor:
    """(n, D) and (m, D), of any type -> (n, m), float32; little cancels around the centre (D,)."""
    return torch.cdist(part.float() - centre, others.float() - centre)


def nearest(queries: Tensor, references: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest references (M, D), M at least k, of each query (N, D), of any type.

    Returns Euclidean distances (N, k), ascending, and rows (N, k) of the references. Matrix
    products select the neighbours; their distances are then computed again without cancellation,
    so that a copy has a distance of exactly 0.
    """
    centre, found = references.mean(dim=0, dtype=torch.float), []
    for part in queries.split(max(1, min(QUERIES, BLOCK // len(references)))):
        chosen = _distances(part, references, centre).topk(k, dim=1, largest=False).indices
        exact = [(part.float() - references[row].float()).norm(dim=1) for row in chosen.T]
        distances, order = torch.stack(exact, dim=1).sort(dim=1)
        found.append((distances, chosen.gather(1, order)))
    distances, rows = (torch.cat(column) for column in zip(*found, strict=True))
    return distances, rows


def manifold_metrics(real: Tensor, samples: Tensor, weights: Weights) -> dict[str, Estimate]:
    """How many samples lie among the real images, and the reverse.

    Each image has a ball that reaches to its k-th neighbour in its own set. Precision is the
    share of the samples in a real ball, recall that of real images in a ball of a sample (k = 3,
    arXiv 1904.06991); density the mean number of real balls that contain a sample, over k;
    coverage the share of the real balls that contain a sample (k = 5, arXiv 2002.09797). Images
    are resampled, the radii are not. Features are (N, D) and (M, D), each of more than 5 images.
    """
    radii = nearest(samples, samples, PRECISION_K + 1)[0][:, PRECISION_K]
    real_radii = nearest(real, real, DENSITY_K + 1)[0]  # the nearest is the image itself
    narrow, wide = real_radii[:, PRECISION_K], real_radii[:, DENSITY_K]
    centre = real.mean(dim=0)
    precise, density = [], []
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool, device=real.device)
    for part, radius in zip(samples.split(QUERIES), radii.split(QUERIES), strict=True):
        distances = _distances(part, real, centre)
        precise.append((distances <= narrow).any(dim=1))
        density.append((distances <= wide).sum(dim=1) / DENSITY_K)
        covered |= (distances <= wide).any(dim=0)
        recalled |= (distances <= radius[:, None]).any(dim=0)
    return {
        "precision": mean(torch.cat(precise), weights[1]),
        "recall": mean(recalled, weights[0]),
        "density": mean(torch.cat(density), weights[1], POSITIVE),
        "coverage": mean(covered, weights[0]),
    }


class Closest(NamedTuple):
    """The distance and the row of the nearest training image of each image, (N,) each.

    Its ratio to the mean distance of the 10 nearest is 0 for a copy. It scales with the
    neighbourhood, so that plain images, which all lie close together, are not suspected.
    """

    distances: Tensor
    ratios: Tensor
    rows: Tensor


def closest(images: Tensor, training: Tensor) -> Closest:
    """The nearest of training images (M, D), M of 2 or more; pixels or features (N, D)."""
    distances, rows = nearest(images, training, min(NEIGHBOURS, len(training)))
    average = distances.mean(dim=1).clamp(min=1e-12)
    return Closest(distances[:, 0], distances[:, 0] / average, rows[:, 0])


def copies(found: Closest, new: Closest) -> Tensor:
    """Which images are nearer to training images than the nearest 1 % of new images, (N,)."""
    return found.ratios <= new.ratios.kthvalue(math.ceil(COPY * len(new.ratios))).values


def diversity(features: Tensor, labels: Sequence[str], weights: Tensor, seed: int) -> Estimate:
    """Mean distance in features (N, D) of an image to another random image of its label.

    An image that is alone with its label counts as 0.
    """
    generator = torch.Generator().manual_seed(seed)
    apart = torch.zeros(len(features), device=features.device)
    for label in sorted(set(labels)):
        rows = torch.tensor([row for row, own in enumerate(labels) if own == label])
        rows = rows[torch.randperm(len(rows), generator=generator)].to(features.device)
        apart[rows] = (features[rows] - features[rows.roll(1)]).norm(dim=1)
    return mean(apart, weights, POSITIVE)


def pair_distances(real: Features, images: Features, weights: Weights) -> dict[str, Estimate]:
    """Distances of N images from M real ones, by weights (R, M) and (R, N)."""
    pair = real.features, images.features
    return {"fd": frechet_distance(*pair, weights), "kd": kernel_distance(*pair, weights)}


def set_metrics(
    real: Features,
    images: Features,
    weights: Weights,
    labels: Sequence[str],
    targets: Tensor | None,
    seed: int,
) -> dict[str, Estimate]:
    """All metrics of N images beside M real ones, by weights (R, M) and (R, N).

    `targets` (N,) are the classes of the `labels`, or None where there are no classes.
    """
    found = pair_distances(real, images, weights)
    if images.logits is not None:
        found["class_score"] = class_score(images.logits, weights[1])
    found |= manifold_metrics(real.features, images.features, weights)
    found["diversity"] = diversity(images.features, labels, weights[1], seed)
    if targets is not None:
        found["label_agreement"] = label_agreement(images, targets, weights[1])
    return found


# Metrics that are named after the network, by their published names in Inception.
INCEPTION_NAMES = {"fd": "fid", "kd": "kid", "class_score": "inception_score"}


def key(name: str, network: str) -> str:
    """What a metric is called in a network: FID is the Frechet distance in Inception only."""
    if name not in INCEPTION_NAMES:
        return name
    return INCEPTION_NAMES[name] if network == "inception" else f"{name}_{network}"
