"""The three evaluations: of reconstructions, of samples, and of the likelihood of images."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils import figures
from utils.data.images import ImageDataset
from utils.evaluation import distances, features, metrics
from utils.evaluation.distances import Comparison, Features
from utils.evaluation.features import FeatureNetwork
from utils.evaluation.image_sets import ImageSet, RealImages, Samples, Tokens
from utils.evaluation.metrics import IMAGE_METRICS, POSITIVE, Estimate, ImageMetric
from utils.evaluation.records import Record
from utils.evaluation.samples import DecodedImages

PAIRS = 32  # images that are shown beside their reconstruction or nearest training image
RANKED = 50  # images of the highest likelihood that are shown, and as many of the lowest
SPACES = ("pixels", "features")  # where nearest training images are searched


# --- reconstructions ----------------------------------------------------------------------------


def report_reconstructions(
    tokenizer: Any,
    dataset: ImageDataset,
    network: FeatureNetwork | None,
    *,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    device: torch.device,
    batch_size: int,
    seed: int,
    protocol: dict[str, Any],
) -> Record:
    """Encode and decode all images of a data set, and compare.

    Args:
        tokenizer: with encode, decode and config, on `device`.
        dataset: N images of the tokenizer's size.
        network: for distances between the sets and, where it has classes, agreement with the
            labels; it must not have been trained on these images then.
        lpips: two batches of images -> perceptual distances (B,), or None.
        device, batch_size: for the networks.
        seed: of the resamples.
        protocol: of the record.
    """
    table = IMAGE_METRICS | ({} if lpips is None else {"lpips": ImageMetric(lpips)})
    grids, errors = measure_reconstructions(tokenizer, dataset, device, batch_size, table)
    weights = metrics.resample(len(dataset), seed)
    found = metrics.mean_errors(errors, weights, table)
    config, tokens_per_pixel = (
        tokenizer.config,
        math.prod(grids.shape[1:]) / math.prod(dataset.size),
    )
    found["bits_per_pixel"] = Estimate(math.log2(config.codebook_size) * tokens_per_pixel, 0.0)
    shares = metrics.index_frequencies(grids, config.codebook_size, config.depth, weights)
    found |= metrics.code_estimates(shares, tokens_per_pixel)
    originals = ImageSet.whole(dataset)
    decoded = ImageSet.whole(
        DecodedImages(grids, dataset.rows, tokenizer.decode, dataset.channels, dataset.size)
    )
    if network is not None:
        real, made = (
            features.extract_features(network, *part, device, batch_size, what)
            for part, what in ((originals, "originals"), (decoded, "reconstructions"))
        )
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
            *(part.load(order[:PAIRS], device) for part in (originals, decoded))
        )
        for name, order in orders.items()
    }
    columns = {"image_path": [row.image_path for row in dataset.rows], "label": originals.labels}
    columns |= {name: values.tolist() for name, values in errors.items()}
    by_label = {}
    for label in sorted(set(originals.labels) - {""}):
        rows = torch.tensor([row for row, own in enumerate(originals.labels) if own == label])
        part = {name: values[rows] for name, values in errors.items()}
        by_label[label] = metrics.mean_errors(part, metrics.resample(len(rows), seed), table)
    return Record(found, {**protocol, "images": len(dataset)}, columns, pictures, by_label)


@torch.inference_mode()
def measure_reconstructions(
    tokenizer: Any,
    dataset: ImageDataset,
    device: torch.device,
    batch_size: int,
    table: Mapping[str, ImageMetric],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Indices (N, h, w[, depth]), int32, and the metrics (N,) of each image, on the CPU."""
    grids: list[Tensor] = []
    errors: dict[str, list[Tensor]] = {name: [] for name in table}
    with tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for images in dataset.batches(torch.arange(len(dataset)).split(batch_size), device):
            indices = tokenizer.encode(images)
            decoded = tokenizer.decode(indices)
            grids.append(indices.to("cpu", torch.int32))
            for name, metric in table.items():
                errors[name].append(metric.compute(images, decoded).cpu())
            bar.update(len(images))
    return torch.cat(grids), {name: torch.cat(part) for name, part in errors.items()}


# --- samples ------------------------------------------------------------------------------------


def report_samples(
    network: FeatureNetwork,
    real: RealImages,
    samples: Samples,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    protocol: dict[str, Any],
) -> Record:
    """Compare samples, and images held out, with training images, the same number of each.

    Only nearest neighbours are searched among all training images.

    Args:
        network: of the features.
        real: training images, and images held out.
        samples: of the same size as the real images.
        device, batch_size: for the networks.
        seed: of the choice of images where a set has more than needed, and of the resamples.
        protocol: of the record.
    """
    whole = real.train, samples.images, real.held_out
    count = min(len(part.row_numbers) for part in whole)
    train, sampled, held_out = (part.sample(count, seed) for part in whole)

    def extract(part: ImageSet, what: str) -> Features:
        return features.extract_features(network, *part, device, batch_size, what)

    all_train = extract(real.train, "training images")
    train_features = all_train.select(torch.searchsorted(real.train.row_numbers, train.row_numbers))
    features.warn_if_few(train_features, network.name)
    weights = [metrics.resample(count, seed + number) for number in range(3)]
    # By the prefix of the names of their metrics.
    sets = {"": (sampled, weights[1]), "real_": (held_out, weights[2])}
    found: dict[str, dict[str, Estimate]] = {}
    closest: dict[str, dict[str, distances.Closest]] = {}
    for prefix, (part, own_weights) in sets.items():
        extracted = extract(part, "held out" if prefix else "samples")
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
    pictures = {}
    for space, near in closest[""].items():  # the most suspicious samples and what they are near
        suspects = near.ratios.argsort(stable=True)[:PAIRS]
        pair = sampled.load(suspects, device), real.train.load(near.rows[suspects], device)
        pictures[f"closest_pairs_{space}"] = figures.comparison(*pair)
    if samples.tokens is not None:
        tokens = samples.tokens
        grids = (
            _encode(tokens, train, device, batch_size),
            tokens.grids[sampled.row_numbers],
            _encode(tokens, held_out, device, batch_size),
        )
        shares = [
            metrics.index_frequencies(own, tokens.codebook_size, tokens.depth, own_weights)
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
    rows = _sample_rows(real.train, sampled, closest[""])
    return Record(ordered, {**protocol, **counts}, rows, pictures)


@torch.inference_mode()
def _encode(tokens: Tokens, part: ImageSet, device: torch.device, batch_size: int) -> Tensor:
    """The indices of real images, (N, h, w[, depth])."""
    batches = part.images.batches(part.row_numbers.split(batch_size), device)
    return torch.cat([tokens.encode(images).cpu() for images in batches])


def _sample_rows(
    train: ImageSet, samples: ImageSet, closest: Mapping[str, distances.Closest]
) -> dict[str, list]:
    """A line for each sample: its nearest training image in each space, and the distance."""
    paths = [row.image_path for row in samples.rows]
    columns: dict[str, list] = {"image_path": paths, "label": samples.labels}
    for space, found in closest.items():
        rows = train.row_numbers[found.rows.cpu()].tolist()
        columns[f"nearest_in_{space}"] = [train.images.rows[row].image_path for row in rows]
        columns[f"distance_in_{space}"] = found.distances.tolist()
        columns[f"ratio_in_{space}"] = found.ratios.tolist()
    return columns


# --- likelihood ---------------------------------------------------------------------------------


@torch.inference_mode()
def bits_of_images(
    nats_per_token: Callable[[Tensor, Tensor], Tensor],
    dataset: ImageDataset,
    prefix: Tensor,
    device: torch.device,
    batch_size: int,
) -> Tensor:
    """Bits per token of the indices of each image, (N,).

    Args:
        nats_per_token: prefixes (B, ...) and images (B, C, H, W) -> (B, tokens).
        dataset: N images.
        prefix: the conditioning of each image, (N, ...).
        device: of the models.
        batch_size: images at once.
    """
    batches = torch.arange(len(dataset)).split(batch_size)
    bits = []
    with tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for rows, images in zip(batches, dataset.batches(batches, device), strict=True):
            nats = nats_per_token(prefix[rows].to(device), images)
            bits.append(nats.double().mean(dim=1).cpu() / math.log(2))
            bar.update(len(rows))
    return torch.cat(bits)


def report_likelihood(
    bits: Tensor,
    dataset: ImageDataset,
    tokens_per_pixel: float,
    *,
    device: torch.device,
    seed: int,
    protocol: dict[str, Any],
) -> Record:
    """The mean bits, and all images from the highest to the lowest likelihood.

    Args:
        bits: of `bits_of_images`, (N,).
        dataset: the N images.
        tokens_per_pixel: indices of a grid over pixels of an image.
        device: where to put pictures together.
        seed: of the resamples.
        protocol: of the record.
    """
    order = bits.argsort(stable=True)
    weights = metrics.resample(len(dataset), seed)
    per_image = {"bits_per_token": bits, "bits_per_pixel": bits * tokens_per_pixel}
    found = {name: metrics.mean(part, weights, POSITIVE) for name, part in per_image.items()}
    ends = [order[:RANKED], order[-RANKED:].flip(0)]
    names = "highest_likelihood", "lowest_likelihood"
    grids = (figures.grid(images) for images in dataset.batches(ends, device))
    rows = [dataset.rows[row] for row in order.tolist()]
    columns: dict[str, Sequence[Any]] = {
        "image_path": [row.image_path for row in rows],
        "label": [row.label for row in rows],
        **{name: part[order].tolist() for name, part in per_image.items()},
    }
    pictures = dict(zip(names, grids, strict=True))
    return Record(found, {**protocol, "images": len(dataset)}, columns, pictures)
