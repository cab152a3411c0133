"""Everything that one set of images shows beside real images of the same number."""

import torch
from torch import Tensor

from utils.evaluation import bootstrap, distances
from utils.evaluation.bootstrap import Figure
from utils.evaluation.features import FeatureNetwork, Seen
from utils.evaluation.neighbours import manifold_metrics


def quality(
    network: FeatureNetwork, real: Seen, others: Seen, weights: tuple[Tensor, Tensor]
) -> dict[str, Figure]:
    """Distances, class score, precision and recall, density and coverage.

    Args:
        network: what they were seen through.
        real, others: N and M images.
        weights: of `bootstrap.resample`, (R, N) and (R, M).
    """
    pair, keys = (real.features, others.features), network.keys
    figures = {
        keys["frechet"]: distances.frechet_distance(*pair, weights),
        keys["kernel"]: distances.kernel_distance(*pair, weights),
    }
    if others.logits is not None:
        figures[keys["score"]] = distances.class_score(others.logits, weights[1])
    return figures | manifold_metrics(*pair, weights)


def reconstruction_distances(
    network: FeatureNetwork, originals: Seen, reconstructions: Seen, weights: Tensor
) -> dict[str, Figure]:
    """Distances of N reconstructions to their originals, rFID in Inception; weights (R, N)."""
    pair, both = (originals.features, reconstructions.features), (weights, weights)
    return {
        f"r{network.keys['frechet']}": distances.frechet_distance(*pair, both),
        f"r{network.keys['kernel']}": distances.kernel_distance(*pair, both),
    }


def diversity(features: Tensor, labels: list[str], weights: Tensor, seed: int) -> Figure:
    """Mean distance of an image to another one of its label, drawn at random.

    Args:
        features: (N, D).
        labels: N of them; an image that is alone with its label counts as 0.
        weights: (R, N).
        seed: of the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    apart = torch.zeros(len(features), device=features.device)
    for label in sorted(set(labels)):
        rows = torch.tensor([row for row, own in enumerate(labels) if own == label])
        rows = rows[torch.randperm(len(rows), generator=generator)].to(features.device)
        apart[rows] = (features[rows] - features[rows.roll(1)]).norm(dim=1)
    return bootstrap.mean(apart, weights, bootstrap.POSITIVE)


def say_accuracy(share: Figure, count: int) -> None:
    """Print how good the classifier itself is: its `agreement` on real images new to it."""
    print(f"classifier: {100 * share.value:.1f} % of the labels of {count:,} held-out images right")


def agreement(seen: Seen, targets: Tensor, weights: Tensor) -> Figure:
    """The share of the images that a classifier gives the class that they should have.

    Args:
        seen: N images through a classifier.
        targets: (N,).
        weights: (R, N).
    """
    return bootstrap.mean(seen.logits.argmax(dim=1).cpu() == targets, weights)
