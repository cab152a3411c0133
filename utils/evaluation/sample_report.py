"""Samples beside real images: every figure of the samples, and the same of images held out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils import figures
from utils.evaluation import bootstrap, classifier, features, frequencies, memorisation
from utils.evaluation import sample_quality as quality
from utils.evaluation.bootstrap import Figure
from utils.evaluation.features import FeatureNetwork, Seen
from utils.evaluation.parts import Part
from utils.evaluation.record import Record

PAIRS = 32  # samples that are shown beside their nearest training image
SPACES = ("pixels", "features")


class Compared(NamedTuple):
    """One of the sets, and what is known of it."""

    part: Part
    seen: Seen
    weights: Tensor


class Tokens(NamedTuple):
    """How to compare indices: those of the samples' rows, and images -> their indices."""

    grids: Tensor
    encode: Callable[[Tensor], Tensor]
    codebook_size: int
    depth: int


def report(
    network: FeatureNetwork,
    train: Part,
    held_out: Part,
    samples: Part,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    protocol: dict,
    tokens: Tokens | None = None,
) -> Record:
    """Compare samples, and images held out, with training images, equally many of each.

    Only nearest neighbours are sought among all training images.
    """
    count = min(len(part.rows) for part in (train, held_out, samples))
    held_out, samples = held_out.some(count, seed), samples.some(count, seed)

    def look(part: Part, what: str) -> Seen:
        return features.look(network, part.images, part.rows, device, batch_size, what)

    memory = look(train, "training images")
    real = train.some(count, seed)
    real = Compared(
        real,
        memory.pick(torch.searchsorted(train.rows, real.rows)),
        bootstrap.resample(count, seed),
    )
    sets = {
        "": Compared(samples, look(samples, "samples"), bootstrap.resample(count, seed + 1)),
        "real_": Compared(
            held_out, look(held_out, "held out"), bootstrap.resample(count, seed + 2)
        ),
    }
    found: dict[str, dict[str, Figure]] = {}
    closest: dict[str, dict[str, memorisation.Closest]] = {}
    for prefix, one in sets.items():
        pair = real.weights, one.weights
        own = quality.quality(network, real.seen, one.seen, pair)
        own["diversity"] = quality.diversity(one.seen.features, one.part.labels, one.weights, seed)
        if network.class_names and all(one.part.labels):
            classes = classifier.targets(
                [one.part.images.rows[row] for row in one.part.rows.tolist()],
                network.class_names,
                "the held-out images" if prefix else "the samples",
            )
            own["label_agreement"] = quality.agreement(one.seen, classes, one.weights)
        closest[prefix] = {
            space: memorisation.closest(getattr(one.seen, space), getattr(memory, space))
            for space in SPACES
        }
        found[prefix] = own
    limits = {space: memorisation.threshold(near) for space, near in closest["real_"].items()}
    for prefix, one in sets.items():
        for space, near in closest[prefix].items():
            found[prefix] |= memorisation.figures(near, space, limits[space], one.weights)
    pictures = {
        f"closest_pairs_{space}": _pairs(train, samples, closest[""][space], device)
        for space in SPACES
    }
    if tokens is not None:
        shares = [_shares(tokens, one, device, batch_size) for one in (real, sets["real_"])]
        grids = tokens.grids[samples.rows]
        shares.append(
            frequencies.frequencies(grids, tokens.codebook_size, tokens.depth, sets[""].weights)
        )
        for prefix, other in (("real_", shares[1]), ("", shares[2])):
            found[prefix]["token_divergence"] = frequencies.divergence(shares[0], other)
        pictures["token_frequencies"] = figures.distributions(shares[0][0], shares[2][0])
    ordered = {
        f"{prefix}{key}": found[prefix][key]
        for key in found[""]
        for prefix in ("", "real_")
        if key in found[prefix]
    }
    return Record(
        ordered, {**protocol, "images": count}, _rows(train, samples, closest[""]), pictures
    )


def _shares(tokens: Tokens, one: Compared, device: torch.device, batch_size: int) -> Tensor:
    """The frequencies of the indices that real images have, (R, codes)."""
    rows = one.part.rows.split(batch_size)
    with torch.inference_mode():
        grids = torch.cat([tokens.encode(x).cpu() for x in one.part.images.batches(rows, device)])
    return frequencies.frequencies(grids, tokens.codebook_size, tokens.depth, one.weights)


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
