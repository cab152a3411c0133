"""Pictures that trainings and evaluations share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MIN_SIDE = 512  # MLflow shows pictures small and smooths them: enlarge them first
GAP = 1  # pixels between images
WHITE_ERROR = 0.25  # of the whole range of a pixel
MAX_BARS, BAR_HEIGHT = 2048, 128  # of a picture of distributions


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1], C of 1, 3 or 4 -> a picture, values outside clamped."""
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def enlarge(picture: Image.Image, min_side: int = MIN_SIDE) -> Image.Image:
    """The picture enlarged by a whole factor, pixels sharp, until its sides reach `min_side`."""
    factor = max(1, math.ceil(min_side / max(picture.size)))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] in rows, a near-square by default."""
    count, channels, height, width = images.shape
    if columns is None:
        columns = min(count, max(1, round(math.sqrt(count * height / width))))
    rows = math.ceil(count / columns)
    canvas = torch.zeros(
        channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP
    )  # mid-grey
    for number, image in enumerate(images.float().cpu()):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        canvas[:, top : top + height, left : left + width] = image
    return enlarge(to_pil(canvas))


def comparison(originals: Tensor, reconstructions: Tensor) -> Image.Image:
    """Original, reconstruction and error side by side, each three in a near-square grid.

    Args:
        originals, reconstructions: (N, C, H, W) in [-1, 1].
    """
    originals, reconstructions = originals.float().cpu(), reconstructions.float().cpu()
    errors = error_maps(originals, reconstructions)
    return grid(torch.cat([originals, reconstructions, errors], dim=3))


def pairs(left: Tensor, right: Tensor) -> Image.Image:
    """Two batches side by side, each pair in a near-square grid.

    Args:
        left, right: (N, C, H, W) in [-1, 1]; those on the left are brought to the size of those
            on the right, and both to the larger number of channels.
    """
    sides = [left.float().cpu(), right.float().cpu()]
    if sides[0].shape[2:] != sides[1].shape[2:]:
        sides[0] = torch.nn.functional.interpolate(sides[0], size=sides[1].shape[2:])
    channels = max(images.shape[1] for images in sides)
    return grid(torch.cat([_widen(images, channels) for images in sides], dim=3))


def _widen(images: Tensor, channels: int) -> Tensor:
    """The same images with more channels: grey as RGB, what has no alpha opaque."""
    if images.shape[1] == 1 < channels:
        images = images.expand(-1, 3, -1, -1)
    if images.shape[1] < channels:
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    return images


def comparison_table(
    names: list[str], originals: Tensor, reconstructions: Tensor
) -> dict[str, list[Any]]:
    """A table of images (N, C, H, W) in [-1, 1] by name, there and back."""

    def pictures(images: Tensor) -> list[Image.Image]:
        return [enlarge(to_pil(image), 128) for image in images]

    # MLflow compares runs at first by a column of numbers, else by the first name of the alphabet.
    return {
        "image_path": names,
        "reconstruction": pictures(reconstructions),
        "reference": pictures(originals),
    }


def error_maps(images: Tensor, others: Tensor) -> Tensor:
    """Where two batches (N, C, H, W) in [-1, 1] differ, in the same shape: grey, and opaque.

    Black where they are equal, white where the channels differ by `WHITE_ERROR` or more on
    average: a scale that does not change, so that pictures of different steps compare.
    """
    errors = (images - others).abs().mean(dim=1, keepdim=True) / (2 * WHITE_ERROR)
    shades = (errors.clamp(max=1) * 2 - 1).expand(images.shape).clone()
    if images.shape[1] == 4:
        shades[:, 3] = 1
    return shades


def heat(values: Tensor) -> Image.Image:
    """(h, w) of any numbers as a picture: the lowest black, the highest white."""
    low, high = values.min(), values.max()
    shade = (values - low) / (high - low).clamp(min=1e-12)
    return enlarge(to_pil(shade[None] * 2 - 1))


def distributions(shares: Tensor, others: Tensor) -> Image.Image:
    """Two distributions over the same things, (K,) each: one upwards, the other downwards.

    The order is that of the first, falling. Up to 2,048 bars; beyond, neighbours share one.
    """
    order = shares.argsort(descending=True)
    up, down = (
        F.adaptive_avg_pool1d(x[order].float()[None], min(len(x), MAX_BARS))[0]
        for x in (shares, others)
    )
    top = torch.cat([up, down]).max().clamp(min=1e-12)
    level = torch.linspace(1, 0, BAR_HEIGHT)[:, None]
    halves = [(up / top >= level), (down / top >= level).flip(0)]
    return enlarge(to_pil(torch.cat(halves).float()[None] * 2 - 1))
