"""The three evaluations, of reconstructions, samples and likelihoods, and the record of each."""

import argparse
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from utils import cli, figures
from utils.cli import first_few
from utils.data.images import ImageDataset
from utils.data.sources import Row, column_of, digest
from utils.evaluation import distances, features, metrics
from utils.evaluation.features import DecodedImages, ImageSet, Settings, extract_features
from utils.evaluation.inputs import RealImages
from utils.evaluation.metrics import POSITIVE, Estimate, ImageMetric
from utils.progress import warn

FOLDER = "evaluation"  # in an output folder, and in MLflow
PAIRS = 32  # images that are shown beside another
RANKED = 50  # images of the highest likelihood that are shown, and of the lowest
SPACES = ("pixels", "features")  # where nearest training images are searched
# Prefixes of metrics, and what they are printed as; "" is what is evaluated.
SETS = {"real_": "real images", "reconstructed_": "reconstructions", "": ""}
MIX_TOLERANCE = 0.05  # total difference of class shares without a warning


@dataclass(frozen=True)
class Record:
    """The result of an evaluation."""

    metrics: Mapping[str, Estimate]
    protocol: Mapping[str, Any]  # how they were measured
    rows: Mapping[str, Sequence[Any]]  # columns of the table with a line for each image
    pictures: Mapping[str, Image.Image]

    def save(self, run: Any, kind: str, name: str) -> None:
        """Print the metrics, write <kind>.json, <kind>.csv and pictures, and log all to MLflow.

        Files go to the output folder of a tracking run and to its artifacts in evaluation/<name>,
        metrics to test/, by the same keys in every run.
        """
        import pandas

        folder, section = run.output_dir, f"{FOLDER}/{name}"
        folder.mkdir(parents=True, exist_ok=True)
        values: dict[str, dict[str, float]] = {}
        columns: dict[str, dict[str, str]] = {}
        for key, metric in self.metrics.items():
            (value, error, _), (low, high) = metric, metric.interval
            values[key] = {"value": value, "low": low, "high": high, "standard_error": error}
            prefix = next(one for one in SETS if key.startswith(one))
            column = columns.setdefault(SETS[prefix] or kind, {})
            column[key.removeprefix(prefix)] = f"{value:.5g} ({low:.4g} to {high:.4g})"
        content = {"metrics": values, "protocol": {**self.protocol}, "made_by": cli.command_line()}
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
        run.metrics("test", {key: one["value"] for key, one in values.items()}, 0)
        print(f"95 % intervals\n{pandas.DataFrame(columns).fillna('').to_string()}")
        print(f"written to {folder}: {', '.join(file.name for file in files)}")


def name_of(path: str | Path) -> str:
    """The name of the evaluation on a CSV or a folder: its parent folder and its own name.

    So `train.csv` of two data sets stay apart, in files as well as in MLflow.
    """
    path = Path(path).resolve()
    parts = path.parent.name, path.stem if path.suffix == ".csv" else path.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(filter(None, parts)))


def protocol(flags: argparse.Namespace, dataset: ImageDataset) -> dict[str, Any]:
    """How all metrics of an evaluation are measured; `flags` name its CSVs and the seed."""
    flagged = ("path_to_data", "path_to_test", "path_to_train")
    paths = {name: path for name in flagged if (path := getattr(flags, name, None))}
    versions = {package: metadata.version(package) for package in ("torch", "torchvision")}
    return {
        "size": list(dataset.size),
        "channels": dataset.channels,
        "preprocessing": "resized to cover the size, cut in the middle, values to [-1, 1]",
        **paths,
        **{f"{name}_sha256": digest(path) for name, path in paths.items()},
        "seed": flags.seed,
        "interval": f"value +- {metrics.WIDTH} standard errors of {metrics.REPLICATES} bootstrap "
        "resamples, cut at the bounds of the metric",
        "versions": {"python": platform.python_version(), **versions},
    }


def _columns(rows: Sequence[Row]) -> dict[str, Sequence[Any]]:
    """The first columns of every table."""
    return {name: column_of(rows, name) for name in ("image_path", "label")}


def report_reconstructions(
    tokenizer: Any,
    dataset: ImageDataset,
    table: Mapping[str, ImageMetric],
    network: features.FeatureNetwork | None,
    training: ImageDataset | None,
    settings: Settings,
) -> Record:
    """Encode and decode all images of a data set, and compare.

    Pairs are compared by the metrics of `table`, the sets in `network`, or in a classifier that is
    trained on `training`; if that is another data set, reconstructions are classified as well.
    """
    config = tokenizer.config

    @torch.inference_mode()
    def measure(images: Tensor) -> dict[str, Tensor]:
        indices = tokenizer.encode(images)
        made = tokenizer.decode(indices)
        return {"indices": indices.int(), **{name: table[name](images, made) for name in table}}

    errors = ImageSet.whole(dataset).map(settings, "reconstructions", measure)
    grids = errors.pop("indices")
    weights = metrics.resample(len(dataset), settings.seed)
    found = metrics.mean_errors(errors, weights, table)
    tokens_per_pixel = math.prod(grids.shape[1:]) / math.prod(dataset.size)
    bits = math.log2(config.codebook_size) * tokens_per_pixel
    found["bits_per_pixel"] = Estimate(bits, 0.0)
    counts = metrics.index_counts(grids, config.codebook_size, config.depth, weights)
    found |= metrics.code_estimates(counts, tokens_per_pixel)
    decoded = ImageSet.whole(DecodedImages(grids, dataset.rows, tokenizer))
    sets = {"originals": ImageSet.whole(dataset), "reconstructions": decoded}
    protocol: dict[str, Any] = {"images": len(dataset)}
    if training is not None:
        known = ImageSet.whole(training)
        network = features.train_classifier(known, str(training.path), settings)
    if network is not None:
        protocol |= network.protocol
        real, made = (extract_features(network, x, settings, name) for name, x in sets.items())
        targets = None
        if training not in (None, dataset):  # the images are new to the classifier
            targets = features.class_targets(network, dataset.rows, str(dataset.path))
        features.check_network(network, real, targets)
        pairs = distances.pair_distances(real, made, (weights, weights))
        found |= {f"r{distances.key(name, network.name)}": x for name, x in pairs.items()}
        if targets is not None:
            for prefix, part in (("", made), ("real_", real)):
                agreement = features.label_agreement(part, targets, weights)
                found[f"{prefix}label_agreement"] = agreement
    pictures = {}
    worst = errors["mse"].argsort(descending=True, stable=True)
    for name, order in {"": torch.arange(len(dataset)), "worst_": worst}.items():
        pair = (part.load(order[:PAIRS], settings.device) for part in sets.values())
        pictures[f"{name}reconstructions"] = figures.comparison(*pair)
    columns = {name: values.tolist() for name, values in errors.items()}
    return Record(found, protocol, _columns(dataset.rows) | columns, pictures)


def report_samples(
    network: features.FeatureNetwork | None,
    real: RealImages,
    samples: features.Images,
    tokenizer: Any,
    settings: Settings,
) -> Record:
    """Compare samples with images held out, beside what they can be expected to reach.

    The same number of each is compared: samples; training images, as a perfect model would give
    them; and reconstructions of these, where a `tokenizer` is given. The training images are new to
    the classifier, which is trained on the other ones, unless there is a `network`.
    """
    seed, device = settings.seed, settings.device
    smaller = min(len(samples), len(real.held_out.row_numbers))
    train, others = features.reserve(real.train, smaller, seed)
    count = len(train.row_numbers)
    compared = real.held_out, ImageSet.whole(samples)
    held_out, sampled = (part.split(count, seed)[0] for part in compared)
    network = network or features.train_classifier(others, "--path_to_data", settings)
    sets = {"": sampled}  # by the prefix of the names of their metrics
    if tokenizer is not None:
        grids = encode(tokenizer, train, settings)
        sets["reconstructed_"] = ImageSet.whole(DecodedImages(grids, train.rows, tokenizer))
    sets["real_"] = train

    reference = extract_features(network, held_out, settings, "held out")
    weights, *own_weights = (metrics.resample(count, seed + n) for n in range(1 + len(sets)))
    targets = features.class_targets(network, held_out.rows, "the images held out")
    features.check_network(network, reference, targets)
    found: dict[str, Estimate] = {}
    seen: dict[str, features.Features] = {}
    for (prefix, part), own in zip(sets.items(), own_weights, strict=True):
        what, labels = SETS[prefix] or "samples", [row.label for row in part.rows]
        images = seen[prefix] = extract_features(network, part, settings, what)
        targets = features.class_targets(network, part.rows, f"the {what}")
        values = distances.set_metrics(reference, images, (weights, own), labels, targets, seed)
        found |= {f"{prefix}{distances.key(name, network.name)}": x for name, x in values.items()}

    columns, pictures = _columns(sampled.rows), {}
    if network.class_names:
        found_classes = seen[""].logits.argmax(dim=1).tolist()
        columns["classified_as"] = [network.class_names[number] for number in found_classes]
    all_train = extract_features(network, real.train, settings, "training images")
    for space in SPACES:  # all training images are searched for copies
        near = distances.closest(getattr(seen[""], space), getattr(all_train, space))
        new = distances.closest(getattr(reference, space), getattr(all_train, space))
        for prefix, found_near, own in (("", near, own_weights[0]), ("real_", new, weights)):
            found[f"{prefix}nearest_{space}"] = metrics.mean(found_near.distances, own, POSITIVE)
            found[f"{prefix}copies_{space}"] = metrics.mean(distances.copies(found_near, new), own)
        paths = [row.image_path for row in real.train.rows]
        columns[f"nearest_in_{space}"] = [paths[row] for row in near.rows.tolist()]
        columns[f"distance_in_{space}"] = near.distances.tolist()
        columns[f"ratio_in_{space}"] = near.ratios.tolist()
        suspects = near.ratios.argsort(stable=True)[:PAIRS]  # the likeliest copies
        pair = sampled.load(suspects, device), real.train.load(near.rows[suspects], device)
        pictures[f"closest_pairs_{space}"] = figures.comparison(*pair)
    if isinstance(samples, DecodedImages):
        tokens = (encode(tokenizer, held_out, settings), samples.grids[sampled.row_numbers], grids)
        size, depth = tokenizer.config.codebook_size, tokenizer.config.depth
        owned = zip(tokens, (weights, own_weights[0], own_weights[-1]), strict=True)
        real_counts, *counts = (metrics.index_counts(x, size, depth, own) for x, own in owned)
        for prefix, other in zip(("", "real_"), counts, strict=True):
            found[f"{prefix}token_divergence"] = metrics.token_divergence(real_counts, other)
    protocol = {
        "images": count,
        "training_images": len(real.train.row_numbers),
        "class_mix": class_mix(samples.rows, real.held_out.rows),
        **network.protocol,
    }
    return Record(found, protocol, columns, pictures)


def class_mix(samples: Sequence[Row], real: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """The share of each label among samples and among real images; warns where they differ."""
    counts = [Counter(row.label for row in part) for part in (samples, real)]
    if any("" in count for count in counts):
        return {}
    sizes = len(samples), len(real)
    mix, chance = {}, 0.0
    for label in sorted(counts[0] | counts[1]):
        mix[label] = counts[0][label] / sizes[0], counts[1][label] / sizes[1]
        pooled = (counts[0][label] + counts[1][label]) / sum(sizes)
        chance += math.sqrt(pooled * (1 - pooled) * (1 / sizes[0] + 1 / sizes[1]))
    difference = sum(abs(a - b) for a, b in mix.values()) / 2
    if difference > MIX_TOLERANCE + chance:  # about 2.5 times the mean of chance
        largest = sorted(mix.items(), key=lambda item: -abs(item[1][0] - item[1][1]))
        shown = [f"{label} {a:.0%} against {b:.0%}" for label, (a, b) in largest]
        warn(
            f"samples and real images have other shares of classes ({first_few(shown, limit=3)}), "
            "which alone raises every distance; generate classes as often as they occur, or give "
            "real images of the same mix"
        )
    return mix


@torch.inference_mode()
def encode(tokenizer: Any, part: ImageSet, settings: Settings) -> Tensor:
    """The indices of real images, (N, h, w[, depth])."""
    found = part.map(settings, "encoding", lambda images: {"indices": tokenizer.encode(images)})
    return found["indices"]


@torch.inference_mode()
def report_likelihood(
    gpt: Any, tokenizer: Any, dataset: ImageDataset, prefix: Tensor, settings: Settings
) -> Record:
    """The mean bits of all N images, ranked from the highest to the lowest likelihood.

    `prefix` (N, ...) is the conditioning of each image.
    """
    own = prefix[settings.group.block(len(prefix), settings.batch_size)]
    given = iter(own.split(settings.batch_size))

    def measure(images: Tensor) -> dict[str, Tensor]:
        nats = gpt.loss(next(given).to(images.device), tokenizer.encode(images))  # (B, tokens)
        bits = nats.cpu().double() / math.log(2)
        per_pixel = bits.sum(dim=1) / math.prod(dataset.size)
        return {"bits_per_token": bits.mean(dim=1), "bits_per_pixel": per_pixel}

    per_image = ImageSet.whole(dataset).map(settings, "likelihood", measure)
    weights = metrics.resample(len(dataset), settings.seed)
    found = {name: metrics.mean(part, weights, POSITIVE) for name, part in per_image.items()}
    order = per_image["bits_per_token"].argsort(stable=True)
    ends = [order[:RANKED], order[-RANKED:].flip(0)]
    grids = (figures.grid(images) for images in dataset.batches(ends, settings.device))
    pictures = dict(zip(("highest_likelihood", "lowest_likelihood"), grids, strict=True))
    columns = _columns([dataset.rows[row] for row in order.tolist()])
    columns |= {name: part[order].tolist() for name, part in per_image.items()}
    return Record(found, {"images": len(dataset)}, columns, pictures)
