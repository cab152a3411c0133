"""How far reconstructions are from their originals, image by image."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from utils import metrics
from utils.data.images import ImageDataset
from utils.evaluation import bootstrap
from utils.evaluation.bootstrap import Figure


class Measured(NamedTuple):
    """Indices (N, h, w[, depth]), int32; the errors (N,) of each image, by name; on the CPU."""

    grids: Tensor
    errors: dict[str, Tensor]


@torch.inference_mode()
def measure_reconstructions(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    device: torch.device,
    batch_size: int,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Measured:
    """Encode and decode all images of a data set, and compare each with its original.

    Args:
        encode: images (B, C, H, W) in [-1, 1] -> indices (B, h, w[, depth]).
        decode: indices -> images.
        dataset: N images.
        device: of the model.
        batch_size: images at once.
        lpips: two batches of images -> their perceptual distances (B,).
    """
    measures = {"mse": metrics.squared_error, "ssim": metrics.ssim}
    if lpips is not None:
        measures["lpips"] = lpips
    grids, errors = [], {name: [] for name in measures}
    with tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for images in dataset.batches(torch.arange(len(dataset)).split(batch_size), device):
            indices = encode(images)
            decoded = decode(indices)
            grids.append(indices.to("cpu", torch.int32))
            for name, measure in measures.items():
                errors[name].append(measure(images, decoded).cpu())
            bar.update(len(images))
    return Measured(torch.cat(grids), {name: torch.cat(part) for name, part in errors.items()})


def figures(errors: Mapping[str, Tensor], weights: Tensor) -> dict[str, Figure]:
    """Mean errors, and the PSNR of the mean squared error in dB.

    Args:
        errors: of `measure_reconstructions`, (N,) each.
        weights: of `bootstrap.resample`, (R, N).
    """
    bounds = {"ssim": (-1.0, 1.0)}
    means = {
        name: bootstrap.mean(part, weights, bounds.get(name, bootstrap.POSITIVE))
        for name, part in errors.items()
    }
    mse = (weights.double() @ errors["mse"].double() / len(errors["mse"])).clamp(min=1e-20)
    return {"mse": means.pop("mse"), "psnr": bootstrap.figure(-10 * mse.log10()), **means}


def figures_by_label(
    errors: Mapping[str, Tensor], labels: Sequence[str], seed: int
) -> dict[str, dict[str, Figure]]:
    """`figures` of the images of each label; none where there are no labels."""
    found = {}
    for label in sorted(set(labels) - {""}):
        rows = torch.tensor([row for row, own in enumerate(labels) if own == label])
        part = {name: values[rows] for name, values in errors.items()}
        found[label] = figures(part, bootstrap.resample(len(rows), seed))
    return found
