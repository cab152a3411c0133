"""Shares of a whole as pictures: bars and points, with a line of words above them."""

from itertools import pairwise

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE, TOP, MARGIN = 512, 32, 12  # of a plot, of the words above it, around it, in pixels
INK, PALE, LINE = (31, 70, 120), (190, 190, 190), (214, 39, 40)
MAX_RADIUS = 12  # of a point


def bars(shares: Tensor) -> Image.Image:
    """Shares (n,) of a whole as bars from left to right, with a line where all would be alike.

    Where there are more bars than pixels a column shows the largest of its shares.
    """
    used, alike = int((shares > 0).sum()), 1 / len(shares)
    largest = max(float(shares.max()), alike)
    picture, draw = _empty(
        f"{used:,} of {len(shares):,} in use, largest share {float(shares.max()):.2%}; "
        f"line: all alike, {alike:.2%}"
    )
    inner, bottom = SIDE - 2 * MARGIN, TOP + SIDE - MARGIN
    columns = shares.double().cpu().tensor_split(min(inner, len(shares)))
    edges = torch.linspace(MARGIN, SIDE - MARGIN, len(columns) + 1).round().int().tolist()
    for column, (left, right) in zip(columns, pairwise(edges), strict=True):
        height = round(inner * float(column.max()) / largest)
        if height:
            gap = right - left > 3
            draw.rectangle((left, bottom - height, right - 1 - gap, bottom), fill=INK)
    level = bottom - round(inner * alike / largest)
    draw.line((MARGIN, level, SIDE - MARGIN, level), fill=LINE)
    return picture


def points(places: Tensor, shares: Tensor) -> Image.Image:
    """Points (n, 2) in the plane with areas as their shares, of which the first n of (K,) count."""
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


def _empty(words: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIDE, TOP + SIDE), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 2), words, fill="black", font=ImageFont.load_default(14))
    return picture, draw
