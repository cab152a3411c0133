"""Pictures that trainings and evaluations share."""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_SIDE = 512  # MLflow shows pictures small and smooths them: enlarge them first
GAP = 1  # pixels between images
WHITE_ERROR = 0.25  # of the whole range of a pixel
SIDE, TOP, MARGIN = 512, 32, 12  # of a plot, of its title, around it, in pixels
INK, PALE, LINE, TICK = (31, 70, 120), (190, 190, 190), (214, 39, 40), (255, 160, 0)
MAX_RADIUS = 12  # of a point


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1], C of 1, 3 or 4 -> a picture, values outside clamped.

    Colours of images with alpha are premultiplied, as image files are read.
    """
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).cpu().numpy()
    if array.shape[2] == 4:
        size = array.shape[1], array.shape[0]
        return Image.frombytes("RGBa", size, array.tobytes()).convert("RGBA")
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def enlarge(picture: Image.Image, min_side: int = MIN_SIDE) -> Image.Image:
    """The picture enlarged by a whole factor, pixels sharp, until its sides reach `min_side`."""
    factor = max(1, math.ceil(min_side / max(picture.size)))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] in rows, a near-square by default, on mid-grey."""
    count, channels, height, width = images.shape
    if columns is None:
        columns = min(count, max(1, round(math.sqrt(count * height / width))))
    tiles = torch.zeros(math.ceil(count / columns) * columns, channels, height + GAP, width + GAP)
    tiles[:count, :, :height, :width] = images.float().cpu()
    rows = tiles.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # C, row, y, column, x
    return enlarge(to_pil(rows.flatten(3).flatten(1, 2)[:, :-GAP, :-GAP]))


def comparison(originals: Tensor, reconstructions: Tensor) -> Image.Image:
    """Batches (N, C, H, W) in [-1, 1] -> each original, reconstruction and error side by side."""
    originals, reconstructions = originals.float().cpu(), reconstructions.float().cpu()
    errors = error_maps(originals, reconstructions)
    return grid(torch.cat([originals, reconstructions, errors], dim=3))


def pairs(left: Tensor, right: Tensor) -> Image.Image:
    """Two batches (N, C, H, W) in [-1, 1] side by side, each pair in a near-square grid.

    The left images are resized to the right ones, and both get the larger number of channels.
    """
    sides = [left.float().cpu(), right.float().cpu()]
    if sides[0].shape[2:] != sides[1].shape[2:]:
        sides[0] = F.interpolate(sides[0], size=sides[1].shape[2:])
    channels = max(images.shape[1] for images in sides)
    return grid(torch.cat([_widen(images, channels) for images in sides], dim=3))


def _widen(images: Tensor, channels: int) -> Tensor:
    """The same images with more channels: grey as RGB, opaque where alpha is missing."""
    if images.shape[1] == 1 < channels:
        images = images.expand(-1, 3, -1, -1)
    if images.shape[1] < channels:
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    return images


def comparison_table(
    names: list[str], originals: Tensor, reconstructions: Tensor
) -> dict[str, list[Any]]:
    """A table of images (N, C, H, W) in [-1, 1] by name, with their reconstructions."""

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
    average: a fixed scale, so that pictures of different steps compare.
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


def bars(shares: Tensor, others: Tensor | None = None) -> Image.Image:
    """Shares (K,) of a whole as bars from left to right, with a line at the uniform share.

    With `others` (K,), in descending order of the shares, and a tick at each of the others. Where
    there are more bars than pixels, a column shows the largest of its shares.
    """
    used, uniform = int((shares > 0).sum()), 1 / len(shares)
    picture, draw = _empty(
        f"{used:,} of {len(shares):,} in use, largest share {float(shares.max()):.2%}; "
        f"line: uniform, {uniform:.2%}"
    )
    order = torch.arange(len(shares)) if others is None else shares.argsort(descending=True).cpu()
    drawn = [one.double().cpu()[order] for one in (shares, others) if one is not None]
    largest = max(uniform, *(float(one.max()) for one in drawn))
    inner, bottom = SIDE - 2 * MARGIN, TOP + SIDE - MARGIN
    count = min(inner, len(shares))
    edges = torch.linspace(MARGIN, SIDE - MARGIN, count + 1).round().int().tolist()
    for number, one in enumerate(drawn):
        for column, (left, right) in zip(one.tensor_split(count), pairwise(edges), strict=True):
            level = bottom - round(inner * float(column.max()) / largest)
            edge = right - 1 - (right - left > 3)  # with a gap between wide bars
            if number:
                draw.line((left, level, edge, level), fill=TICK)
            elif level < bottom:
                draw.rectangle((left, level, edge, bottom), fill=INK)
    level = bottom - round(inner * uniform / largest)
    draw.line((MARGIN, level, SIDE - MARGIN, level), fill=LINE)
    return picture


def points(places: Tensor, shares: Tensor) -> Image.Image:
    """Points (n, 2) in the plane with areas in proportion to the first n of the shares (K,)."""
    picture, draw = _empty(f"the first {len(places):,}; area: share, hollow: none")
    inner = SIDE - 2 * (MARGIN + MAX_RADIUS)
    places = places.double().cpu()
    middle = (places.amax(dim=0) + places.amin(dim=0)) / 2
    extent = 2 * float((places - middle).abs().max()) or 1.0  # one scale for both axes
    shares = shares[: len(places)]
    radii = MAX_RADIUS * (shares / shares.max().clamp(min=1e-12)).sqrt()
    for (x, y), radius in zip(((places - middle) / extent).tolist(), radii.tolist(), strict=True):
        centre = SIDE / 2 + x * inner, TOP + SIDE / 2 - y * inner
        box = [c + d for d in (-max(radius, 2), max(radius, 2)) for c in centre]
        if radius > 0:
            draw.ellipse(box, fill=INK, outline="white")
        else:
            draw.ellipse(box, outline=PALE)
    return picture


def _empty(text: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIDE, TOP + SIDE), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 2), text, fill="black", font=ImageFont.load_default(14))
    return picture, draw
