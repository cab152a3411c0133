"""Metrics of a set of images beside real images, from the features of both in some network.

All sums are in float64 on the device of the features. `SET_METRICS` lists what evaluate.py
reports: a new metric is one function and one row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from utils.evaluation.features import Features, label_agreement
from utils.evaluation.metrics import POSITIVE, Estimate, estimate, frechet_distance, mean

CHUNK = 2048  # rows of a kernel matrix at a time
QUERIES, REFERENCES = 2048, 8192  # rows of a block of distances
PRECISION_K, DENSITY_K = 3, 5  # neighbours, of the papers
NEIGHBOURS = 10
COPY = 0.01  # share of new images that count as copies

Weights = tuple[Tensor, Tensor]  # of `metrics.resample`, one for each set


# --- kernel distance, class score ---------------------------------------------------------------


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


# --- nearest neighbours -------------------------------------------------------------------------


def _centre(images: Tensor) -> Tensor:
    """The mean (D,): around it little cancels in the products."""
    return (images.sum(dim=0, dtype=torch.double) / len(images)).float()


def _squared(part: Tensor, others: Tensor, centre: Tensor) -> Tensor:
    """Squared distances (n, m) of (n, D) and (m, D), of any type, in float32."""
    part, others = part.float() - centre, others.float() - centre
    norms = part.square().sum(dim=1, keepdim=True) + others.square().sum(dim=1)
    return torch.addmm(norms, part, others.T, alpha=-2)


def nearest(queries: Tensor, references: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest references (M, D), M at least k, of each query (N, D), of any type.

    Returns Euclidean distances (N, k), ascending, and rows (N, k) of the references. Matrix
    products select the neighbours; their distances are then computed again without cancellation,
    so that a copy has a distance of exactly 0.
    """
    centre = _centre(references)
    found_distances, found_rows = [], []
    for part in queries.split(QUERIES):
        values, rows = [], []
        for start in range(0, len(references), REFERENCES):
            squared = _squared(part, references[start : start + REFERENCES], centre)
            best = squared.topk(min(k, squared.shape[1]), dim=1, largest=False)
            values.append(best.values)
            rows.append(best.indices + start)
        chosen = torch.cat(values, dim=1).topk(k, dim=1, largest=False).indices
        chosen = torch.cat(rows, dim=1).gather(1, chosen)
        exact = [(part.float() - references[row].float()).norm(dim=1) for row in chosen.T]
        distances, order = torch.stack(exact, dim=1).sort(dim=1)
        found_distances.append(distances)
        found_rows.append(chosen.gather(1, order))
    return torch.cat(found_distances), torch.cat(found_rows)


def manifold_metrics(real: Tensor, samples: Tensor, weights: Weights) -> dict[str, Estimate]:
    """How many samples lie among the real images, and the reverse.

    Each image has a ball that reaches to its k-th neighbour in its own set. Precision is the
    share of the samples in a real ball, recall that of real images in a ball of a sample (k = 3,
    arXiv 1904.06991); density the mean number of real balls that contain a sample, over k;
    coverage the share of the real balls that contain a sample (k = 5, arXiv 2002.09797). Images
    are resampled, the radii are not. Features are (N, D) and (M, D), each of more than 5 images.
    """
    real_radii = nearest(real, real, DENSITY_K + 1)[0]  # the nearest is the image itself
    radii = nearest(samples, samples, PRECISION_K + 1)[0][:, PRECISION_K]
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
        "precision": mean(torch.cat(inside), weights[1]),
        "recall": mean(reached, weights[0]),
        "density": mean(torch.cat(depth), weights[1], POSITIVE),
        "coverage": mean(covered, weights[0]),
    }


# --- memorisation: are samples copies of training images? ---------------------------------------


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


# --- what a set of images is compared by --------------------------------------------------------


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


@dataclass
class Comparison:
    """A set of N images beside M real ones, in one feature network."""

    real: Features
    images: Features
    weights: Weights  # (R, M) and (R, N)
    labels: Sequence[str] = ()  # of the N images
    targets: Tensor | None = None  # class (N,) of each label; None where there are no classes
    seed: int = 0  # of random pairs

    @cached_property
    def manifold(self) -> dict[str, Estimate]:
        """`manifold_metrics` of both sets."""
        return manifold_metrics(self.real.features, self.images.features, self.weights)


# Each gives None where the set does not have what it needs, such as labels.
SET_METRICS: dict[str, Callable[[Comparison], Estimate | None]] = {
    "fd": lambda c: frechet_distance(c.real.features, c.images.features, c.weights),
    "kd": lambda c: kernel_distance(c.real.features, c.images.features, c.weights),
    "class_score": lambda c: (
        None if c.images.logits is None else class_score(c.images.logits, c.weights[1])
    ),
    "precision": lambda c: c.manifold["precision"],
    "recall": lambda c: c.manifold["recall"],
    "density": lambda c: c.manifold["density"],
    "coverage": lambda c: c.manifold["coverage"],
    "diversity": lambda c: diversity(c.images.features, c.labels, c.weights[1], c.seed),
    "label_agreement": lambda c: (
        None if c.targets is None else label_agreement(c.images, c.targets, c.weights[1])
    ),
}
RECONSTRUCTION_METRICS = ("fd", "kd")  # of reconstructions beside their originals: rFD, rKD

# Metrics that are named after the network, by their published names in Inception.
INCEPTION_NAMES = {"fd": "fid", "kd": "kid", "class_score": "inception_score"}
TITLES = {"fd": "FD", "kd": "KD", "class_score": "class score"}
TITLES |= {"fid": "FID", "kid": "KID", "inception_score": "Inception Score"}


def set_metrics(
    comparison: Comparison, network: str, names: Sequence[str] = tuple(SET_METRICS)
) -> dict[str, Estimate]:
    """Those of the set metrics `names` that apply, by their `key` in a network."""
    found = {key(name, network): SET_METRICS[name](comparison) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def key(name: str, network: str) -> str:
    """What a metric is called in a network: FID is the Frechet distance in Inception only."""
    if name not in INCEPTION_NAMES:
        return name
    return INCEPTION_NAMES[name] if network == "inception" else f"{name}_{network}"


def title(name: str) -> str:
    """How a metric is printed: real_fd_classifier is real FD (classifier)."""
    real, name = ("real ", name[5:]) if name.startswith("real_") else ("", name)
    stem, _, network = name.rpartition("_")
    stem, network = (stem, f" ({network})") if network in ("classifier", "dinov2") else (name, "")
    rebuilt = "r" if stem.startswith("r") and stem[1:] in TITLES else ""
    stem = stem.removeprefix(rebuilt)
    return f"{real}{rebuilt}{TITLES.get(stem, stem)}{network}"
