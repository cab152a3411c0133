"""Pictures that trainings and evaluations share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

MIN_SIDE = 512  # MLflow shows pictures small and smooths them: enlarge them first
GAP = 1  # pixels between images
WHITE_ERROR = 0.25  # of the whole range of a pixel
SIDE, TOP, MARGIN = 512, 32, 12  # of a plot, of its title, around it, in pixels
INK, PALE, LINE = (31, 70, 120), (190, 190, 190), (214, 39, 40)
MAX_RADIUS = 12  # of a point
MIN_TOKEN = 28  # of an index over its image


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
    return ImageOps.scale(picture, factor, Image.Resampling.NEAREST)


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
    errors = error_maps(originals, reconstructions)
    return grid(torch.cat([originals, reconstructions, errors], dim=3))


def pairs(left: Tensor, right: Tensor) -> Image.Image:
    """Two batches (N, C, H, W) in [-1, 1] side by side, each pair in a near-square grid.

    The left images are resized to the right ones, and both get the larger number of channels:
    grey becomes RGB, and images without alpha opaque.
    """
    sides = [F.interpolate(left.float().cpu(), size=right.shape[2:]), right.float().cpu()]
    channels = max(images.shape[1] for images in sides)
    for number, images in enumerate(sides):
        if images.shape[1] == 1 < channels:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] < channels:
            images = F.pad(images, (0, 0, 0, 0, 0, 1), value=1.0)
        sides[number] = images
    return grid(torch.cat(sides, dim=3))


def comparison_table(
    names: list[str], originals: Tensor, reconstructions: Tensor
) -> dict[str, list[Any]]:
    """A table of images (N, C, H, W) in [-1, 1] by name, with their reconstructions."""
    # MLflow compares runs at first by a column of numbers, else by the first name of the alphabet.
    columns = {"reconstruction": reconstructions, "reference": originals}
    pictures = {name: [enlarge(to_pil(x), 128) for x in part] for name, part in columns.items()}
    return {"image_path": names, **pictures}


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
    """(h, w) of any numbers: the lowest black, the highest white; those that are equal are grey."""
    low, high = values.min(), values.max()
    shade = 0.5 + (values - (low + high) / 2) / (high - low).clamp(min=1e-3)
    return enlarge(to_pil(shade[None] * 2 - 1))


def tokens(image: Tensor, indices: Tensor, chosen: int) -> Image.Image:
    """An image (C, H, W) under its indices (h, w), with a frame around the chosen number."""
    side = token_side(indices)
    size = indices.shape[1] * side, indices.shape[0] * side
    picture = to_pil(image).convert("RGB").resize(size, Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(min(20, side / 2.5))
    for number, index in enumerate(indices.flatten().tolist()):
        top, left = (n * side for n in divmod(number, indices.shape[1]))
        centre = left + side / 2, top + side / 2
        outline: dict[str, Any] = {"stroke_width": 2, "stroke_fill": "black"}
        draw.text(centre, str(index), "white", font, "mm", **outline)
        if number == chosen:
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline=LINE, width=3)
    return picture


def token_side(indices: Tensor) -> int:
    """Pixels of an index in `tokens`."""
    return max(MIN_TOKEN, MIN_SIDE // max(indices.shape))


def bars(shares: Tensor) -> Image.Image:
    """Shares (K,) of a whole as bars from left to right, with a line at the uniform share.

    Where there are more bars than pixels, a column shows the largest of its shares.
    """
    used, uniform = int((shares > 0).sum()), 1 / len(shares)
    picture = _empty(
        f"{used:,} of {len(shares):,} in use, largest share {float(shares.max()):.2%}; "
        f"line: uniform, {uniform:.2%}"
    )
    side = SIDE - 2 * MARGIN
    count = min(side, len(shares))
    scale = side / max(uniform, float(shares.max()))
    column = torch.arange(side) * count // side  # number of the bar at each pixel
    heights = F.adaptive_max_pool1d(shares.float().cpu()[None], count)[0] * scale
    height = torch.arange(side, 0, -1)[:, None]  # of each row of pixels
    gap = F.pad(column.diff() > 0, (0, 1)) & (side // count > 3)  # between wide bars
    pixels = torch.full((side, side, 3), 255, dtype=torch.uint8)
    pixels[(height <= heights.round()[column]) & ~gap] = torch.tensor(INK, dtype=torch.uint8)
    pixels[-max(1, round(uniform * scale))] = torch.tensor(LINE, dtype=torch.uint8)
    picture.paste(Image.fromarray(pixels.numpy()), (MARGIN, TOP + MARGIN))
    return picture


def principal_components(vectors: Tensor) -> Tensor:
    """Vectors (n, D) -> their two first principal components, (n, 2), on the CPU.

    The sign of each axis is fixed, so that pictures of different steps compare.
    """
    vectors = vectors.double().cpu()
    vectors = vectors - vectors.mean(dim=0)
    axes = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -2:].flip(1)  # (D, 2)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    projected = (vectors @ (axes * largest.sign())).float()
    return F.pad(projected, (0, 2 - projected.shape[1]))  # where D is 1


def points(places: Tensor, shares: Tensor) -> Image.Image:
    """Points (n, 2) in the plane with areas in proportion to the first n of the shares (K,)."""
    picture = _empty(f"the first {len(places):,}; area: share, hollow: none")
    draw, inner = ImageDraw.Draw(picture), SIDE - 2 * (MARGIN + MAX_RADIUS)
    places = places.double().cpu()
    places = places - (places.amax(dim=0) + places.amin(dim=0)) / 2
    places = inner * places / (2 * places.abs().max()).clamp(min=1e-12)  # one scale for both axes
    shares = shares[: len(places)]
    radii = MAX_RADIUS * (shares / shares.max().clamp(min=1e-12)).sqrt()
    for (x, y), radius in zip(places.tolist(), radii.tolist(), strict=True):
        centre = SIDE / 2 + x, TOP + SIDE / 2 - y
        box = [c + d for d in (-max(radius, 2), max(radius, 2)) for c in centre]
        fill, outline = (INK, "white") if radius > 0 else (None, PALE)
        draw.ellipse(box, fill=fill, outline=outline)
    return picture


def _empty(title: str) -> Image.Image:
    """A white plot below its title."""
    picture, font = Image.new("RGB", (SIDE, TOP + SIDE), "white"), ImageFont.load_default(14)
    ImageDraw.Draw(picture).text((MARGIN, MARGIN - 2), title, fill="black", font=font)
    return picture
