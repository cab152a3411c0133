"""The three evaluations, of reconstructions, samples and likelihoods, and the record of each."""

import argparse
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import cli, figures
from utils.cli import first_few
from utils.data.images import ImageDataset
from utils.data.sources import Row, digest
from utils.evaluation import distances, features, metrics
from utils.evaluation.distances import Comparison
from utils.evaluation.features import (
    UNKNOWN,
    DecodedImages,
    FeatureNetwork,
    ImageSet,
    Settings,
    extract_features,
)
from utils.evaluation.inputs import RealImages, Samples
from utils.evaluation.metrics import IMAGE_METRICS, POSITIVE, Estimate, ImageMetric

FOLDER = "evaluation"  # in an output folder, and in MLflow
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "torch-fidelity", "transformers", "lpips")
PAIRS = 32  # images that are shown beside their reconstruction or nearest training image
RANKED = 50  # images of the highest likelihood that are shown, and as many of the lowest
SPACES = ("pixels", "features")  # where nearest training images are searched
# Prefixes of the names of metrics, and what they are printed as; "" is what is evaluated.
SETS = {"real_": "real images", "reconstructed_": "reconstructions", "": ""}
MIX_TOLERANCE = 0.05  # difference of class shares, in total, that is not worth a warning


@dataclass(frozen=True)
class Record:
    """The result of an evaluation."""

    metrics: Mapping[str, Estimate]
    protocol: Mapping[str, Any]  # how they were measured
    rows: Mapping[str, Sequence[Any]]  # columns of the table with a line for each image
    pictures: Mapping[str, Image.Image]
    by_label: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    def save(self, run: Any, kind: str, name: str) -> None:
        """Print the metrics, write <kind>.json, <kind>.csv and pictures, and log all to MLflow.

        Files go to the output folder of a tracking run and to its artifacts in evaluation/<name>,
        metrics to test/, by the same keys in every run.
        """
        import pandas

        folder, section = run.output_dir, f"{FOLDER}/{name}"
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "metrics": _plain(self.metrics),
            "by_label": {label: _plain(part) for label, part in self.by_label.items()},
            "protocol": dict(self.protocol),
            "made_by": cli.command_line(),
        }
        files = [folder / f"{kind}.json", folder / f"{kind}.csv"]
        files[0].write_text(json.dumps(content, indent=2) + "\n")
        table = pandas.DataFrame(self.rows)
        table.to_csv(files[1], index=False, float_format="%.6g", na_rep="nan")
        for key, picture in self.pictures.items():
            files.append(folder / f"{key}.png")
            picture.save(files[-1])
            run.picture(f"{section}/{key}", picture, 0)
        for file in files:
            run.file(file, section)
        run.metrics("test", {key: metric.value for key, metric in self.metrics.items()}, 0)
        print("\n".join(self.lines(kind)))
        print(f"written to {folder}: {', '.join(file.name for file in files)}")

    def lines(self, kind: str) -> list[str]:
        """A table of the metrics with their intervals; real images in a column of their own."""
        table: dict[str, dict[str, str]] = {}
        for key, metric in self.metrics.items():
            prefix = next(one for one in SETS if key.startswith(one))
            low, high = metric.interval
            values = table.setdefault(key.removeprefix(prefix), {})
            values[prefix] = f"{metric.value:.5g} ({low:.4g} to {high:.4g})"
        columns = [one for one in reversed(SETS) if any(one in values for values in table.values())]
        heads = [SETS[one] or kind for one in columns]
        rows = [["95 % intervals", *heads]]
        for key, values in table.items():
            rows.append([distances.title(key), *(values.get(one, "") for one in columns)])
        return ["  ".join(f"{value:>28}" for value in row).rstrip() for row in rows]


def _plain(found: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    names = ("value", "low", "high", "standard_error")
    return {
        key: dict(zip(names, (one.value, *one.interval, one.standard_error), strict=True))
        for key, one in found.items()
    }


def name_of(path: Path) -> str:
    """The name of the evaluation on a CSV or a folder: its parent folder and its own name.

    So `train.csv` of two data sets stay apart, in files as well as in MLflow.
    """
    path = path.resolve()
    parts = path.parent.name, path.stem if path.suffix == ".csv" else path.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(filter(None, parts)))


def protocol(flags: argparse.Namespace, dataset: ImageDataset) -> dict[str, Any]:
    """How all metrics of an evaluation are measured; `flags` name its CSVs and the seed."""
    values: dict[str, Any] = {
        "size": list(dataset.size),
        "channels": dataset.channels,
        "preprocessing": "resized to cover the size, cut in the middle, values to [-1, 1]",
    }
    for name in ("path_to_data", "path_to_test", "path_to_train"):
        path = getattr(flags, name, None)
        if path:
            values |= {name: path, f"{name}_sha256": digest(path)}
    installed = {one.metadata["Name"].lower(): one.version for one in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return values | {
        "seed": flags.seed,
        "interval": f"value +- {metrics.WIDTH} standard errors of {metrics.REPLICATES} bootstrap "
        "resamples, cut at the bounds of the metric",
        "versions": {"python": platform.python_version(), **versions},
    }


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
    counts = metrics.index_counts(grids, config.codebook_size, config.depth, weights)
    found |= metrics.code_estimates(counts, tokens_per_pixel)
    decoded = DecodedImages(grids, dataset.rows, tokenizer.decode, dataset.channels, dataset.size)
    sets = {"originals": ImageSet.whole(dataset), "reconstructions": ImageSet.whole(decoded)}
    protocol: dict[str, Any] = {"images": len(dataset)}
    if network is not None:
        protocol |= network.protocol
        real, made = (
            extract_features(network, part, settings, name) for name, part in sets.items()
        )
        features.warn_if_few(real, network.name)
        compared = Comparison(real, made, (weights, weights))
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
    network: FeatureNetwork | None, real: RealImages, samples: Samples, settings: Settings
) -> Record:
    """Compare samples with images held out, beside what they can be expected to reach.

    The same number of each is compared: samples; training images, as a perfect model would give
    them; and reconstructions of these, where a tokenizer is given. The training images are new to
    the classifier, which is trained on the other ones, unless there is a `network`.
    """
    seed, tokenizer = settings.seed, samples.tokenizer
    smaller = min(len(part.row_numbers) for part in (samples.images, real.held_out))
    train, others = features.reserve(real.train, smaller, seed)
    count = len(train.row_numbers)
    held_out, sampled = (part.sample(count, seed) for part in (real.held_out, samples.images))
    network = network or features.train_classifier(others, real.path, settings)
    sets = {"": sampled, "real_": train}  # by the prefix of the names of their metrics
    if tokenizer is not None:
        grids = _encode(tokenizer, train, settings)
        shape = train.images.channels, train.images.size
        decoded = DecodedImages(grids, train.rows, tokenizer.decode, *shape)
        sets = {"": sampled, "reconstructed_": ImageSet.whole(decoded), "real_": train}

    reference = extract_features(network, held_out, settings, "held out")
    features.warn_if_few(reference, network.name)
    weights, *own_weights = (metrics.resample(count, seed + n) for n in range(1 + len(sets)))
    targets = _targets(network, held_out, "images held out")
    if targets is not None:
        features.print_accuracy(features.label_agreement(reference, targets, weights), count)
    found: dict[str, Estimate] = {}
    for (prefix, part), own in zip(sets.items(), own_weights, strict=True):
        what = SETS[prefix] or "samples"
        seen = extract_features(network, part, settings, what)
        targets = _targets(network, part, what)
        labels = [row.label for row in part.rows]
        compared = Comparison(reference, seen, (weights, own), labels, targets, seed)
        values = distances.set_metrics(compared, network.name)
        found |= {f"{prefix}{key}": metric for key, metric in values.items()}
        if not prefix:
            sampled_features, sampled_targets = seen, targets
    by_label = {}
    if sampled_targets is not None:
        for number, label in enumerate(network.class_names):
            one = torch.where(sampled_targets == number, number, UNKNOWN)
            agreement = features.label_agreement(sampled_features, one, own_weights[0])
            by_label[label] = {"label_agreement": agreement}

    columns, pictures = _columns(sampled.rows), {}
    all_train = extract_features(network, real.train, settings, "training images")
    for space in SPACES:  # all training images are searched for copies
        near, new = (
            distances.closest(getattr(part, space), getattr(all_train, space))
            for part in (sampled_features, reference)
        )
        for prefix, closest, own in (("", near, own_weights[0]), ("real_", new, weights)):
            copied = distances.copies(closest, new)
            found[f"{prefix}nearest_{space}"] = metrics.mean(closest.distances, own, POSITIVE)
            found[f"{prefix}copies_{space}"] = metrics.mean(copied, own)
        rows = real.train.row_numbers[near.rows.cpu()].tolist()
        columns[f"nearest_in_{space}"] = [real.train.images.rows[row].image_path for row in rows]
        columns[f"distance_in_{space}"] = near.distances.tolist()
        columns[f"ratio_in_{space}"] = near.ratios.tolist()
        suspects = near.ratios.argsort(stable=True)[:PAIRS]  # the likeliest copies
        pair = (sampled, suspects), (real.train, near.rows[suspects])
        pictures[f"closest_pairs_{space}"] = figures.comparison(
            *(part.load(positions, settings.device) for part, positions in pair)
        )
    if isinstance(sampled.images, DecodedImages):
        given = sampled.images.grids[sampled.row_numbers]
        config, tokens = tokenizer.config, (_encode(tokenizer, held_out, settings), given, grids)
        shares = [
            metrics.index_counts(part, config.codebook_size, config.depth, own)
            for part, own in zip(tokens, (weights, own_weights[0], own_weights[-1]), strict=True)
        ]
        for prefix, other in zip(("", "real_"), shares[1:], strict=True):
            found[f"{prefix}token_divergence"] = metrics.token_divergence(shares[0], other)
        both = (part[0] / part[0].sum() for part in shares[:2])
        pictures["token_frequencies"] = figures.bars(*both)
    protocol = {
        "images": count,
        "training_images": len(real.train.row_numbers),
        "class_mix": class_mix(samples.images.rows, real.held_out.rows),
        **network.protocol,
    }
    return Record(found, protocol, columns, pictures, by_label)


def _targets(network: FeatureNetwork, part: ImageSet, what: str) -> Tensor | None:
    """The classes of a set of images; None where it has no labels, or the network no classes."""
    if not network.class_names or not all(row.label for row in part.rows):
        return None
    return features.class_targets(part.rows, network.class_names, f"the {what}")


def class_mix(samples: Sequence[Row], real: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """The share of each label among samples and among real images; warns where they differ."""
    counts = [Counter(row.label for row in rows) for rows in (samples, real)]
    if any("" in count for count in counts):
        return {}
    mix, chance = {}, 0.0
    for label in sorted(counts[0] | counts[1]):
        mix[label] = counts[0][label] / len(samples), counts[1][label] / len(real)
        pooled = (counts[0][label] + counts[1][label]) / (len(samples) + len(real))
        chance += math.sqrt(pooled * (1 - pooled) * (1 / len(samples) + 1 / len(real)))
    difference = sum(abs(a - b) for a, b in mix.values()) / 2
    if difference > MIX_TOLERANCE + chance:  # about 2.5 times what chance gives on average
        largest = sorted(mix, key=lambda label: -abs(mix[label][0] - mix[label][1]))
        shown = [f"{label} {mix[label][0]:.0%} against {mix[label][1]:.0%}" for label in largest]
        features.warn(
            f"the samples have another mix of classes than the real images ({first_few(shown, 3)})"
            ", which alone raises every distance; generate classes as often as they occur, or give "
            "real images of the same mix"
        )
    return mix


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
