"""Reconstructions beside their originals: every figure, and what shows them."""

import math
from typing import Any

import torch

from utils import figures
from utils.data.images import ImageDataset
from utils.evaluation import bootstrap, classifier, features, frequencies, reconstruction_quality
from utils.evaluation import sample_quality as quality
from utils.evaluation.bootstrap import Figure
from utils.evaluation.decoded import DecodedImages
from utils.evaluation.features import FeatureNetwork
from utils.evaluation.parts import Part
from utils.evaluation.record import Record

PAIRS = 32  # originals that are shown beside their reconstruction


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
