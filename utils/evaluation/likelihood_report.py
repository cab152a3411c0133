"""What images cost under a GPT: how usual each is, and the most usual and the strangest."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils import figures
from utils.data.images import ImageDataset
from utils.evaluation import bootstrap
from utils.evaluation.bootstrap import POSITIVE
from utils.evaluation.record import Record

SHOWN = 50  # of the most usual images, and as many of the strangest


@torch.inference_mode()
def bits_of_images(
    cost: Callable[[Tensor, Tensor], Tensor],
    dataset: ImageDataset,
    prefix: Tensor,
    device: torch.device,
    batch_size: int,
) -> Tensor:
    """What the indices of each image cost, (N,), in bits per token.

    Args:
        cost: prefixes (B, ...) and images (B, C, H, W) -> nats of each token (B, tokens).
        dataset: N images.
        prefix: what is told of each, (N, ...).
        device: of the models.
        batch_size: images at once.
    """
    batches = torch.arange(len(dataset)).split(batch_size)
    bits = []
    with tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for rows, images in zip(batches, dataset.batches(batches, device), strict=True):
            nats = cost(prefix[rows].to(device), images)
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
    """The mean cost, and all images from the most usual to the strangest.

    Args:
        bits: of `bits_of_images`, (N,).
        dataset: the N images.
        tokens_per_pixel: indices of a grid over pixels of an image.
        device: where to put pictures together.
        seed: of the resamples.
        protocol: of the record.
    """
    order = bits.argsort(stable=True)
    weights = bootstrap.resample(len(dataset), seed)
    found = {
        "bits_per_token": bootstrap.mean(bits, weights, POSITIVE),
        "bits_per_pixel": bootstrap.mean(bits * tokens_per_pixel, weights, POSITIVE),
    }
    ends = [order[:SHOWN], order[-SHOWN:].flip(0)]
    usual, strange = (figures.grid(images) for images in dataset.batches(ends, device))
    rows = [dataset.rows[row] for row in order.tolist()]
    columns = {
        "image_path": [row.image_path for row in rows],
        "label": [row.label for row in rows],
        "bits_per_token": bits[order].tolist(),
        "bits_per_pixel": (bits[order] * tokens_per_pixel).tolist(),
    }
    pictures = {"most_usual": usual, "strangest": strange}
    return Record(found, {**protocol, "images": len(dataset)}, columns, pictures)
