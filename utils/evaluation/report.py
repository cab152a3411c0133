"""The three evaluations: of reconstructions, of samples, and of the likelihood of images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from utils import figures
from utils.data.images import ImageDataset
from utils.evaluation import distances, features, metrics
from utils.evaluation.distances import Comparison, Features
from utils.evaluation.features import FeatureNetwork
from utils.evaluation.image_sets import ImageSet, RealImages, Samples
from utils.evaluation.metrics import IMAGE_METRICS, POSITIVE, Estimate, ImageMetric
from utils.evaluation.records import Record
from utils.evaluation.samples import DecodedImages
from utils.files import sha256

PAIRS = 32  # images that are shown beside their reconstruction or nearest training image
RANKED = 50  # images of the highest likelihood that are shown, and as many of the lowest
SPACES = ("pixels", "features")  # where nearest training images are searched


class Settings(NamedTuple):
    """Where and in which batches networks run; `seed` of resamples and random choices."""

    device: torch.device
    batch_size: int
    seed: int


def reconstruction_classifier(
    dataset: ImageDataset, training: ImageDataset, settings: Settings
) -> FeatureNetwork:
    """A classifier for the images whose reconstructions are evaluated.

    If it is trained on these very images, it has no classes, since it has learned their labels.
    """
    same = sha256(training.path) == sha256(dataset.path)
    whole = ImageSet.whole(dataset if same else training)
    what = str(dataset.path if same else training.path)
    network = features.train_classifier(*whole, what, settings.device, settings.seed)
    if not same:
        return network
    print(
        "classifier: trained on these very images, so that their labels are not compared; "
        "--path_to_train CSV trains it on others"
    )
    return replace(network, class_names=())


def report_reconstructions(
    tokenizer: Any,
    dataset: ImageDataset,
    network: FeatureNetwork | None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    settings: Settings,
) -> Record:
    """Encode and decode all images of a data set, and compare.

    `tokenizer` has encode, decode and config. `network` is for distances between the sets and,
    where it has classes, for agreement with the labels: these images must be new to it then.
    """
    table = IMAGE_METRICS | ({} if lpips is None else {"lpips": ImageMetric(lpips)})
    grids, errors = measure_reconstructions(tokenizer, dataset, table, settings)
    weights = metrics.resample(len(dataset), settings.seed)
    found = metrics.mean_errors(errors, weights, table)
    config = tokenizer.config
    tokens_per_pixel = math.prod(grids.shape[1:]) / math.prod(dataset.size)
    found["bits_per_pixel"] = Estimate(math.log2(config.codebook_size) * tokens_per_pixel, 0.0)
    shares = metrics.index_frequencies(grids, config.codebook_size, config.depth, weights)
    found |= metrics.code_estimates(shares, tokens_per_pixel)
    originals = ImageSet.whole(dataset)
    decoded = ImageSet.whole(
        DecodedImages(grids, dataset.rows, tokenizer.decode, dataset.channels, dataset.size)
    )
    if network is not None:
        real = _extract(network, originals, settings, "originals")
        made = _extract(network, decoded, settings, "reconstructions")
        features.warn_if_few(real, network.name)
        compared = Comparison(real, made, (weights, weights))
        pairs = distances.set_metrics(compared, network.name, distances.RECONSTRUCTION_METRICS)
        found |= {f"r{key}": metric for key, metric in pairs.items()}
        if network.class_names:
            names, what = network.class_names, str(dataset.path)
            targets = features.class_targets(dataset.rows, names, what)
            accuracy = distances.label_agreement(real, targets, weights)
            found["label_agreement"] = distances.label_agreement(made, targets, weights)
            found["real_label_agreement"] = accuracy
            features.print_accuracy(accuracy, len(dataset))
    orders = {
        "reconstructions": torch.arange(len(dataset)),
        "worst_reconstructions": errors["mse"].argsort(descending=True, stable=True),
    }
    pictures = {
        name: figures.comparison(
            *(part.load(order[:PAIRS], settings.device) for part in (originals, decoded))
        )
        for name, order in orders.items()
    }
    labels, by_label = originals.labels, {}
    columns = {"image_path": [row.image_path for row in dataset.rows], "label": labels}
    columns |= {name: values.tolist() for name, values in errors.items()}
    for label in sorted(set(labels) - {""}):
        rows = torch.tensor([row for row, own in enumerate(labels) if own == label])
        part = {name: values[rows] for name, values in errors.items()}
        own_weights = metrics.resample(len(rows), settings.seed)
        by_label[label] = metrics.mean_errors(part, own_weights, table)
    protocol = {"images": len(dataset), **_protocol(network)}
    return Record(found, protocol, columns, pictures, by_label)


@torch.inference_mode()
def measure_reconstructions(
    tokenizer: Any, dataset: ImageDataset, table: Mapping[str, ImageMetric], settings: Settings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Indices (N, h, w[, depth]), int32, and the metrics (N,) of each image, on the CPU."""
    batches = torch.arange(len(dataset)).split(settings.batch_size)
    grids: list[Tensor] = []
    errors: dict[str, list[Tensor]] = {name: [] for name in table}
    with tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for images in dataset.batches(batches, settings.device):
            indices = tokenizer.encode(images)
            decoded = tokenizer.decode(indices)
            grids.append(indices.to("cpu", torch.int32))
            for name, metric in table.items():
                errors[name].append(metric.compute(images, decoded).cpu())
            bar.update(len(images))
    return torch.cat(grids), {name: torch.cat(part) for name, part in errors.items()}


def report_samples(
    network: FeatureNetwork, real: RealImages, samples: Samples, settings: Settings
) -> Record:
    """Compare samples, and images held out, with training images, the same number of each.

    Only nearest neighbours are searched among all training images.
    """
    seed, device = settings.seed, settings.device
    whole = real.train, samples.images, real.held_out
    count = min(len(part.row_numbers) for part in whole)
    train, sampled, held_out = (part.sample(count, seed) for part in whole)
    all_train = _extract(network, real.train, settings, "training images")
    positions = torch.searchsorted(real.train.row_numbers, train.row_numbers)
    train_features = all_train.select(positions)
    features.warn_if_few(train_features, network.name)
    weights = [metrics.resample(count, seed + number) for number in range(3)]
    # By the prefix of the names of their metrics.
    sets = {"": (sampled, weights[1]), "real_": (held_out, weights[2])}
    found: dict[str, dict[str, Estimate]] = {}
    closest: dict[str, dict[str, distances.Closest]] = {}
    for prefix, (part, own_weights) in sets.items():
        extracted = _extract(network, part, settings, "held out" if prefix else "samples")
        targets = None
        if network.class_names and all(part.labels):
            what = "the samples or of the images held out"
            targets = features.class_targets(part.rows, network.class_names, what)
        pair = weights[0], own_weights
        compared = Comparison(train_features, extracted, pair, part.labels, targets, seed)
        found[prefix] = distances.set_metrics(compared, network.name)
        closest[prefix] = {
            space: distances.closest(getattr(extracted, space), getattr(all_train, space))
            for space in SPACES
        }
    for space in SPACES:
        limit = distances.copy_threshold(closest["real_"][space])
        for prefix, (_, own_weights) in sets.items():
            near = closest[prefix][space]
            found[prefix] |= distances.copy_metrics(near, space, limit, own_weights)
    if "label_agreement" in found["real_"]:
        features.print_accuracy(found["real_"]["label_agreement"], count)
    columns: dict[str, Sequence[Any]] = {
        "image_path": [row.image_path for row in sampled.rows],
        "label": sampled.labels,
    }
    pictures = {}
    for space, near in closest[""].items():
        rows = real.train.row_numbers[near.rows.cpu()].tolist()
        columns[f"nearest_in_{space}"] = [real.train.images.rows[row].image_path for row in rows]
        columns[f"distance_in_{space}"] = near.distances.tolist()
        columns[f"ratio_in_{space}"] = near.ratios.tolist()
        suspects = near.ratios.argsort(stable=True)[:PAIRS]  # the likeliest copies
        pair = sampled.load(suspects, device), real.train.load(near.rows[suspects], device)
        pictures[f"closest_pairs_{space}"] = figures.comparison(*pair)
    if samples.tokenizer is not None:
        encode, config = samples.tokenizer.encode, samples.tokenizer.config
        decoded: Any = sampled.images
        sampled_grids = decoded.grids[sampled.row_numbers]
        grids = _encode(encode, train, settings), sampled_grids, _encode(encode, held_out, settings)
        shares = [
            metrics.index_frequencies(own, config.codebook_size, config.depth, own_weights)
            for own, own_weights in zip(grids, weights, strict=True)
        ]
        for prefix, other in zip(sets, shares[1:], strict=True):
            found[prefix]["token_divergence"] = metrics.token_divergence(shares[0], other)
        pictures["token_frequencies"] = figures.distributions(shares[0][0], shares[1][0])
    ordered = {
        f"{prefix}{key}": found[prefix][key]
        for key in found[""]
        for prefix in sets
        if key in found[prefix]
    }
    counts = {"images": count, "training_images": len(real.train.row_numbers)}
    return Record(ordered, {**counts, **_protocol(network)}, columns, pictures)


def _extract(network: FeatureNetwork, part: ImageSet, settings: Settings, what: str) -> Features:
    device, batch_size = settings.device, settings.batch_size
    return features.extract_features(network, *part, device, batch_size, what)


@torch.inference_mode()
def _encode(encode: Callable[[Tensor], Tensor], part: ImageSet, settings: Settings) -> Tensor:
    """The indices of real images, (N, h, w[, depth])."""
    batches = part.row_numbers.split(settings.batch_size)
    images = part.images.batches(batches, settings.device)
    return torch.cat([encode(batch).cpu() for batch in images])


def _protocol(network: FeatureNetwork | None) -> dict[str, str]:
    """Of the features."""
    if network is None:
        return {}
    return {
        "features": network.name,
        "network_sha256": network.sha256,
        "network_preprocessing": network.preprocessing,
    }


@torch.inference_mode()
def report_likelihood(
    nats_per_token: Callable[[Tensor, Tensor], Tensor],
    dataset: ImageDataset,
    prefix: Tensor,
    tokens_per_pixel: float,
    settings: Settings,
) -> Record:
    """The mean bits of all images, ranked from the highest to the lowest likelihood.

    Args:
        nats_per_token: prefixes (B, ...) and images (B, C, H, W) -> (B, tokens).
        dataset: N images.
        prefix: the conditioning of each image, (N, ...).
        tokens_per_pixel: indices of a grid over pixels of an image.
        settings: of the models and the resamples.
    """
    device, batches = settings.device, torch.arange(len(dataset)).split(settings.batch_size)
    parts = []
    with tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for rows, images in zip(batches, dataset.batches(batches, device), strict=True):
            nats = nats_per_token(prefix[rows].to(device), images)
            parts.append(nats.double().mean(dim=1).cpu() / math.log(2))
            bar.update(len(rows))
    bits = torch.cat(parts)
    weights = metrics.resample(len(dataset), settings.seed)
    per_image = {"bits_per_token": bits, "bits_per_pixel": bits * tokens_per_pixel}
    found = {name: metrics.mean(part, weights, POSITIVE) for name, part in per_image.items()}
    order = bits.argsort(stable=True)
    ends = [order[:RANKED], order[-RANKED:].flip(0)]
    grids = (figures.grid(images) for images in dataset.batches(ends, device))
    pictures = dict(zip(("highest_likelihood", "lowest_likelihood"), grids, strict=True))
    rows = [dataset.rows[row] for row in order.tolist()]
    columns: dict[str, Sequence[Any]] = {
        "image_path": [row.image_path for row in rows],
        "label": [row.label for row in rows],
        **{name: part[order].tolist() for name, part in per_image.items()},
    }
    return Record(found, {"images": len(dataset)}, columns, pictures)
