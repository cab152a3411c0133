"""The three evaluations: of reconstructions, of samples, and of the likelihood of images."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils import figures
from utils.data.images import ImageDataset
from utils.data.sources import Row
from utils.evaluation import distances, features, metrics
from utils.evaluation.features import (
    DecodedImages,
    FeatureNetwork,
    ImageSet,
    Settings,
    extract_features,
)
from utils.evaluation.inputs import RealImages, Samples
from utils.evaluation.metrics import IMAGE_METRICS, POSITIVE, Estimate, ImageMetric
from utils.evaluation.records import Record

PAIRS = 32  # images that are shown beside their reconstruction or nearest training image
RANKED = 50  # images of the highest likelihood that are shown, and as many of the lowest
SPACES = ("pixels", "features")  # where nearest training images are searched


def _columns(rows: Sequence[Row]) -> dict[str, Sequence[Any]]:
    """The first columns of every table."""
    return {"image_path": [row.image_path for row in rows], "label": [row.label for row in rows]}


# --- reconstructions ----------------------------------------------------------------------------


def report_reconstructions(
    tokenizer: Any,
    dataset: ImageDataset,
    network: FeatureNetwork | None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    settings: Settings,
    *,
    compare_labels: bool,
) -> Record:
    """Encode and decode all images of a data set, and compare.

    `tokenizer` has encode, decode and config. `network` is for distances between the sets and,
    with `compare_labels`, for agreement with the labels: these images must be new to it then.
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
    decoded = DecodedImages(grids, dataset.rows, tokenizer.decode, dataset.channels, dataset.size)
    sets = {"originals": ImageSet.whole(dataset), "reconstructions": ImageSet.whole(decoded)}
    protocol: dict[str, Any] = {"images": len(dataset)}
    if network is not None:
        protocol |= network.protocol
        real, made = (
            extract_features(network, part, settings, name) for name, part in sets.items()
        )
        features.warn_if_few(real, network.name)
        compared = distances.Comparison(real, made, (weights, weights))
        pairs = distances.set_metrics(compared, network.name, distances.RECONSTRUCTION_METRICS)
        found |= {f"r{key}": metric for key, metric in pairs.items()}
        if compare_labels:
            targets = features.class_targets(dataset.rows, network.class_names, str(dataset.path))
            for prefix, part in (("", made), ("real_", real)):
                agreement = features.label_agreement(part, targets, weights)
                found[f"{prefix}label_agreement"] = agreement
            features.print_accuracy(found["real_label_agreement"], len(dataset))
    orders = {
        "reconstructions": torch.arange(len(dataset)),
        "worst_reconstructions": errors["mse"].argsort(descending=True, stable=True),
    }
    pictures = {
        name: figures.comparison(
            *(part.load(order[:PAIRS], settings.device) for part in sets.values())
        )
        for name, order in orders.items()
    }
    columns, by_label = _columns(dataset.rows), {}
    for label in sorted(set(columns["label"]) - {""}):
        rows = torch.tensor([row for row, own in enumerate(columns["label"]) if own == label])
        part_weights = metrics.resample(len(rows), settings.seed)
        part_errors = {name: values[rows] for name, values in errors.items()}
        by_label[label] = metrics.mean_errors(part_errors, part_weights, table)
    columns |= {name: values.tolist() for name, values in errors.items()}
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


# --- samples ------------------------------------------------------------------------------------


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
    all_train = extract_features(network, real.train, settings, "training images")
    positions = torch.searchsorted(real.train.row_numbers, train.row_numbers)
    train_features = all_train.select(positions)
    features.warn_if_few(train_features, network.name)
    weights = [metrics.resample(count, seed + number) for number in range(3)]
    # By the prefix of the names of their metrics.
    sets = {"": (sampled, weights[1]), "real_": (held_out, weights[2])}
    found: dict[str, dict[str, Estimate]] = {}
    closest: dict[str, dict[str, distances.Closest]] = {}
    for prefix, (part, own_weights) in sets.items():
        extracted = extract_features(network, part, settings, "held out" if prefix else "samples")
        labels, targets = [row.label for row in part.rows], None
        if network.class_names and all(labels):
            what = "the samples or of the images held out"
            targets = features.class_targets(part.rows, network.class_names, what)
        pair = weights[0], own_weights
        compared = distances.Comparison(train_features, extracted, pair, labels, targets, seed)
        found[prefix] = distances.set_metrics(compared, network.name)
        closest[prefix] = {
            space: distances.closest(getattr(extracted, space), getattr(all_train, space))
            for space in SPACES
        }
    for prefix, (_, own_weights) in sets.items():
        for space, near in closest[prefix].items():
            copied = distances.copies(near, closest["real_"][space])
            found[prefix][f"nearest_{space}"] = metrics.mean(near.distances, own_weights, POSITIVE)
            found[prefix][f"copies_{space}"] = metrics.mean(copied, own_weights)
    if "label_agreement" in found["real_"]:
        features.print_accuracy(found["real_"]["label_agreement"], count)
    columns, pictures = _columns(sampled.rows), {}
    for space, near in closest[""].items():
        rows = real.train.row_numbers[near.rows.cpu()].tolist()
        columns[f"nearest_in_{space}"] = [real.train.images.rows[row].image_path for row in rows]
        columns[f"distance_in_{space}"] = near.distances.tolist()
        columns[f"ratio_in_{space}"] = near.ratios.tolist()
        suspects = near.ratios.argsort(stable=True)[:PAIRS]  # the likeliest copies
        pair = sampled.load(suspects, device), real.train.load(near.rows[suspects], device)
        pictures[f"closest_pairs_{space}"] = figures.comparison(*pair)
    if isinstance(sampled.images, DecodedImages):
        model, config = samples.tokenizer, samples.tokenizer.config
        grids = sampled.images.grids[sampled.row_numbers]
        shares = [
            metrics.index_frequencies(own, config.codebook_size, config.depth, own_weights)
            for own, own_weights in zip(
                (_encode(model, train, settings), grids, _encode(model, held_out, settings)),
                weights,
                strict=True,
            )
        ]
        for prefix, other in zip(sets, shares[1:], strict=True):
            found[prefix]["token_divergence"] = metrics.token_divergence(shares[0], other)
        pictures["token_frequencies"] = figures.bars(shares[0][0], shares[1][0])
    ordered = {
        f"{prefix}{key}": found[prefix][key]
        for key in found[""]
        for prefix in sets
        if key in found[prefix]
    }
    counts = {"images": count, "training_images": len(real.train.row_numbers)}
    return Record(ordered, {**counts, **network.protocol}, columns, pictures)


@torch.inference_mode()
def _encode(tokenizer: Any, part: ImageSet, settings: Settings) -> Tensor:
    """The indices of real images, (N, h, w[, depth])."""
    batches = part.images.batches(part.row_numbers.split(settings.batch_size), settings.device)
    return torch.cat([tokenizer.encode(batch).cpu() for batch in batches])


# --- likelihood ---------------------------------------------------------------------------------


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
    columns = _columns([dataset.rows[row] for row in order.tolist()])
    columns |= {name: part[order].tolist() for name, part in per_image.items()}
    return Record(found, {"images": len(dataset)}, columns, pictures)
