"""Samples beside real images: every figure of the samples, and the same of images held out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import figures
from utils.evaluation import bootstrap, classifier, features, frequencies, memorisation
from utils.evaluation import sample_quality as quality
from utils.evaluation.bootstrap import Figure
from utils.evaluation.features import FeatureNetwork, Seen
from utils.evaluation.parts import Part, Real
from utils.evaluation.record import Record
from utils.evaluation.samples import Samples, Tokens

PAIRS = 32  # samples that are shown beside their nearest training image
SPACES = ("pixels", "features")


class Compared(NamedTuple):
    """One of the sets, and what is known of it."""

    part: Part
    seen: Seen
    weights: Tensor


def report_samples(
    network: FeatureNetwork,
    real: Real,
    samples: Samples,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    protocol: dict[str, Any],
) -> Record:
    """Compare samples, and images held out, with training images, equally many of each.

    Only nearest neighbours are sought among all training images.

    Args:
        network: through which sets are compared.
        real: training images, and images held out.
        samples: of the same size as the real images.
        device, batch_size: for the networks.
        seed: of the choice of images where there are more of one set, and of the resamples.
        protocol: of the record.
    """
    count = min(len(part.rows) for part in (real.train, real.held_out, samples.part))
    parts = [part.some(count, seed) for part in (real.train, samples.part, real.held_out)]
    whole = features.look(network, *real.train, device, batch_size, "training images")
    seen = [
        whole.pick(torch.searchsorted(real.train.rows, parts[0].rows)),
        features.look(network, *parts[1], device, batch_size, "samples"),
        features.look(network, *parts[2], device, batch_size, "held out"),
    ]
    network.warn_of_few(seen[0])
    weights = [bootstrap.resample(count, seed + number) for number in range(3)]
    train, drawn, held_out = map(Compared, parts, seen, weights)
    sets = {"": drawn, "real_": held_out}  # by what the names of their figures begin with

    found = {prefix: _quality(network, train, one, seed) for prefix, one in sets.items()}
    closest = {prefix: _closest(one.seen, whole) for prefix, one in sets.items()}
    for space, near in closest["real_"].items():
        limit = memorisation.threshold(near)
        for prefix, one in sets.items():
            copies = memorisation.figures(closest[prefix][space], space, limit, one.weights)
            found[prefix] |= copies
    if "label_agreement" in found["real_"]:
        quality.say_accuracy(found["real_"]["label_agreement"], count)
    pictures = {
        f"closest_pairs_{space}": _pairs(real.train, drawn.part, near, device)
        for space, near in closest[""].items()
    }
    if samples.tokens is not None:
        shares = _shares(samples.tokens, (train, drawn, held_out), device, batch_size)
        for prefix, other in zip(sets, shares[1:], strict=True):
            found[prefix]["token_divergence"] = frequencies.divergence(shares[0], other)
        pictures["token_frequencies"] = figures.distributions(shares[0][0], shares[1][0])
    ordered = {
        f"{prefix}{key}": found[prefix][key]
        for key in found[""]
        for prefix in sets
        if key in found[prefix]
    }
    counts = {"images": count, "training_images": len(real.train.rows)}
    rows = _rows(real.train, drawn.part, closest[""])
    return Record(ordered, {**protocol, **counts}, rows, pictures)


def _quality(
    network: FeatureNetwork, train: Compared, one: Compared, seed: int
) -> dict[str, Figure]:
    """What a set shows beside as many training images."""
    found = quality.quality(network, train.seen, one.seen, (train.weights, one.weights))
    found["diversity"] = quality.diversity(one.seen.features, one.part.labels, one.weights, seed)
    if network.class_names and all(one.part.labels):
        rows = [one.part.images.rows[row] for row in one.part.rows.tolist()]
        what = "the samples or of the images held out"
        classes = classifier.targets(rows, network.class_names, what)
        found["label_agreement"] = quality.agreement(one.seen, classes, one.weights)
    return found


def _closest(seen: Seen, whole: Seen) -> dict[str, memorisation.Closest]:
    """The nearest training image of each image of a set, in each space."""
    return {
        space: memorisation.closest(getattr(seen, space), getattr(whole, space)) for space in SPACES
    }


def _shares(
    tokens: Tokens, sets: tuple[Compared, ...], device: torch.device, batch_size: int
) -> list[Tensor]:
    """How often each index occurs in training images, samples and images held out, (R, codes)."""

    def encoded(part: Part) -> Tensor:
        batches = part.images.batches(part.rows.split(batch_size), device)
        with torch.inference_mode():
            return torch.cat([tokens.encode(images).cpu() for images in batches])

    train, drawn, held_out = sets
    grids = encoded(train.part), tokens.grids[drawn.part.rows], encoded(held_out.part)
    return [
        frequencies.frequencies(own, tokens.codebook_size, tokens.depth, one.weights)
        for own, one in zip(grids, sets, strict=True)
    ]


def _pairs(
    train: Part, samples: Part, closest: memorisation.Closest, device: torch.device
) -> figures.Image.Image:
    """The most suspicious samples (left), each with its nearest training image."""
    places = memorisation.suspects(closest, PAIRS)
    nearest = train.pick(closest.rows[places], device)
    return figures.comparison(samples.pick(places, device), nearest)


def _rows(train: Part, samples: Part, closest: dict[str, memorisation.Closest]) -> dict[str, list]:
    """A line for each sample: where it is nearest to a training image, and how near."""
    paths = [samples.images.rows[row].image_path for row in samples.rows.tolist()]
    columns: dict[str, list] = {"image_path": paths, "label": samples.labels}
    for space, found in closest.items():
        rows = train.rows[found.rows.cpu()].tolist()
        columns[f"nearest_in_{space}"] = [train.images.rows[row].image_path for row in rows]
        columns[f"distance_in_{space}"] = found.distances.tolist()
        columns[f"ratio_in_{space}"] = found.ratios.tolist()
    return columns
