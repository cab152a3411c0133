"""Coloured shapes in relation to each other, with captions that a program can check.

32x32 pixels: "a red circle left of a blue square". Every fifth combination of two objects and
their relation is held out: it never occurs in the training images.
"""

import csv
import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE = 32
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 230),
    "yellow": (240, 210, 30),
    "purple": (150, 40, 190),
    "cyan": (40, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
RADIUS = 4  # of an object, in pixels
ALONG, ACROSS = (4, 8), (8, 12, 16)  # where it may be in its half of the image
SMALLEST = 20  # pixels of an object


class Combination(NamedTuple):
    """A first object in relation to a second one."""

    colour: str
    shape: str
    relation: str
    other_colour: str
    other_shape: str

    @property
    def caption(self) -> str:
        first, second = f"{self.colour} {self.shape}", f"{self.other_colour} {self.other_shape}"
        return f"a {first} {self.relation} a {second}"


@cache
def combinations(*, held_out: bool) -> list[Combination]:
    """All combinations of two different objects that are held out, or all the others."""
    objects = product(COLOURS, SHAPES)
    every = [
        Combination(*first, relation, *second)
        for first, relation, second in product(objects, RELATIONS, [*product(COLOURS, SHAPES)])
        if first != second
    ]
    every.sort(key=lambda x: hashlib.sha256(x.caption.encode()).digest())
    return [x for number, x in enumerate(every) if (number % 5 == 0) == held_out]


@cache
def mask_of(shape: str) -> np.ndarray:
    """The pixels of a shape, (2 * RADIUS + 1, 2 * RADIUS + 1), bool."""
    y, x = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1]
    return {
        "circle": x**2 + y**2 <= (RADIUS + 0.3) ** 2,
        "square": np.ones_like(x, dtype=bool),
        "triangle": abs(x) <= (y + RADIUS) / 2,
        "cross": (abs(x) <= 1) | (abs(y) <= 1),
    }[shape]


def draw(combination: Combination, generator: np.random.Generator) -> Image.Image:
    """An image of a combination, with the objects in random places."""
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    step = np.array(RELATIONS[combination.relation])
    for sign, (colour, shape) in zip((1, -1), (combination[:2], combination[3:]), strict=True):
        # Across its half it has so little room that the relation is clear.
        along, across = generator.choice(ALONG), generator.choice(ACROSS)
        behind = sign * step.sum() > 0
        y, x = np.where(step != 0, along + behind * SIDE // 2, across)
        area = pixels[y - RADIUS : y + RADIUS + 1, x - RADIUS : x + RADIUS + 1]
        area[mask_of(shape)] = COLOURS[colour]
    return Image.fromarray(pixels)


def write_data(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` images of combinations that are not held out, and their CSV shapes.csv."""
    generator, known = np.random.default_rng(seed), combinations(held_out=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "shapes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image_path", "caption"))
        for number in range(count):
            combination = known[number % len(known)]
            draw(combination, generator).save(folder / f"{number:05}.png")
            table.writerow((f"{number:05}.png", combination.caption))
    return folder / "shapes.csv"


def objects_in(image: Image.Image) -> list[tuple[str, str, Sequence[float]]]:
    """Colour, shape and centre of each object of an image."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    parts = ndimage.label(np.linalg.norm(pixels - 255, axis=2) > 110)[0]
    found = []
    for part, place in enumerate(ndimage.find_objects(parts), 1):
        mask = parts == part
        if mask.sum() < SMALLEST:
            continue
        colour = np.median(pixels[mask], axis=0)
        name = min(COLOURS, key=lambda x: float(np.linalg.norm(colour - COLOURS[x])))
        found.append((name, _shape_of(mask[place]), ndimage.center_of_mass(mask)))
    return found


def _shape_of(mask: np.ndarray) -> str:
    """The shape whose pixels overlap most with those of an object, in the best position."""
    overlaps = {}
    for shape in SHAPES:
        ideal = mask_of(shape).astype(float)
        both = ndimage.correlate(np.pad(mask, 3).astype(float), ideal, mode="constant").max()
        overlaps[shape] = both / (mask.sum() + ideal.sum() - both)
    return max(overlaps, key=overlaps.__getitem__)


def obeys(image: Image.Image, combination: Combination) -> bool:
    """Whether an image shows the two objects in their relation, and nothing else."""
    found = objects_in(image)
    if len(found) != 2:
        return False
    step = np.array(RELATIONS[combination.relation])
    for (colour, shape, centre), (other_colour, other_shape, other_centre) in (
        (found[0], found[1]),
        (found[1], found[0]),
    ):
        between = np.subtract(centre, other_centre)
        in_relation = between @ step > abs(between @ (1 - abs(step)))
        seen = colour, shape, combination.relation, other_colour, other_shape
        if in_relation and seen == combination:
            return True
    return False
