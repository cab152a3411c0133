"""Reconstructions beside their originals: every figure, and what shows them."""

import math
from dataclasses import replace
from typing import Any

import torch

from utils import figures
from utils.data.images import ImageDataset
from utils.evaluation import bootstrap, classifier, features, frequencies, reconstruction_quality
from utils.evaluation import sample_quality as quality
from utils.evaluation.bootstrap import Figure
from utils.evaluation.decoded import DecodedImages
from utils.evaluation.features import FeatureNetwork
from utils.evaluation.parts import Part, read_images
from utils.evaluation.record import Record
from utils.files import sha256

PAIRS = 32  # originals that are shown beside their reconstruction


def teach(
    path: str | None, dataset: ImageDataset, device: torch.device, seed: int, **options: Any
) -> tuple[FeatureNetwork, ImageDataset | None]:
    """A classifier for the images whose reconstructions are judged, and what taught it.

    Where these images themselves have to teach it, it has no classes: it would know their labels.

    Args:
        path: CSV that teaches it; None, or a copy of the CSV of the images: these teach it.
        dataset: the images.
        device, seed: see `features.taught_network`.
        options: of `ImageDataset`.

    Raises:
        UserError: see `ImageDataset` and `features.taught_network`.
    """
    other = None
    if path:
        sizes = dataset.size, dataset.channels
        other = read_images(path, "--path_to_train", *sizes, **options)
        if sha256(other.path) != sha256(dataset.path):
            return features.taught_network(*Part.whole(other), path, device, seed), other
    network = features.taught_network(*Part.whole(dataset), str(dataset.path), device, seed)
    print(
        "classifier: taught by these very images, so that their labels are not compared; "
        "--path_to_train CSV teaches it others"
    )
    return replace(network, class_names=()), other


def report_reconstructions(
    tokenizer: Any,
    dataset: ImageDataset,
    network: FeatureNetwork | None,
    *,
    lpips: Any,
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
            labels; it must not have been taught by these images then.
        lpips: two batches of images -> perceptual distances (B,), or None.
        device, batch_size: for the networks.
        seed: of the resamples.
        protocol: of the record.
    """
    config = tokenizer.config
    grids, errors = reconstruction_quality.measure_reconstructions(
        tokenizer.encode, tokenizer.decode, dataset, device, batch_size, lpips
    )
    weights = bootstrap.resample(len(dataset), seed)
    found = reconstruction_quality.figures(errors, weights)
    tokens_per_pixel = math.prod(grids.shape[1:]) / math.prod(dataset.size)
    found["bits_per_pixel"] = Figure(math.log2(config.codebook_size) * tokens_per_pixel, 0.0)
    shares = frequencies.frequencies(grids, config.codebook_size, config.depth, weights)
    found |= frequencies.health(shares, tokens_per_pixel)
    originals = Part.whole(dataset)
    decoded = Part.whole(
        DecodedImages(grids, dataset.rows, tokenizer.decode, dataset.channels, dataset.size)
    )
    if network is not None:
        seen = [
            features.look(network, *part, device, batch_size, what)
            for part, what in ((originals, "originals"), (decoded, "reconstructions"))
        ]
        network.warn_of_few(seen[0])
        found |= quality.reconstruction_distances(network, *seen, weights)
        if network.class_names:
            classes = classifier.targets(dataset.rows, network.class_names, str(dataset.path))
            found["label_agreement"] = quality.agreement(seen[1], classes, weights)
            found["real_label_agreement"] = quality.agreement(seen[0], classes, weights)
            quality.say_accuracy(found["real_label_agreement"], len(dataset))
    orders = {
        "reconstructions": torch.arange(len(dataset)),
        "worst_reconstructions": errors["mse"].argsort(descending=True, stable=True),
    }
    pictures = {
        name: figures.comparison(
            *(part.pick(order[:PAIRS], device) for part in (originals, decoded))
        )
        for name, order in orders.items()
    }
    labels = originals.labels
    columns = {"image_path": [row.image_path for row in dataset.rows], "label": labels}
    columns |= {name: values.tolist() for name, values in errors.items()}
    by_label = reconstruction_quality.figures_by_label(errors, labels, seed)
    return Record(found, {**protocol, "images": len(dataset)}, columns, pictures, by_label)
