"""The images that an evaluation compares: rows of data sets, read and checked."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.images import ImageDataset
from utils.data.table import epoch_order, split_rows
from utils.evaluation.classifier import Images
from utils.evaluation.neighbours import DENSITY_K

SMALLEST = DENSITY_K + 1  # images, where sets are compared by their neighbours


class Part(NamedTuple):
    """Some rows of a source of images."""

    images: Images
    rows: Tensor

    @classmethod
    def whole(cls, images: Images) -> "Part":
        """All rows."""
        return cls(images, torch.arange(len(images)))

    @property
    def labels(self) -> list[str]:
        """Of each row; "" where there is none."""
        return [self.images.rows[row].label for row in self.rows.tolist()]

    def some(self, count: int, seed: int) -> "Part":
        """`count` of the rows, drawn at random."""
        return Part(self.images, epoch_order(self.rows, seed, 0)[:count].sort().values)

    def pick(self, places: Tensor, device: torch.device) -> Tensor:
        """The images at some places of the rows, (n, C, H, W) in [-1, 1]."""
        return next(iter(self.images.batches([self.rows[places.cpu()]], device)))


def read_images(
    path: str | Path,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    at_least: int = 2,
) -> ImageDataset:
    """The images of a CSV; see `ImageDataset`.

    Raises:
        UserError: see there; too few images for figures that mean something.
    """
    dataset = ImageDataset(path, size=size, channels=channels)
    print(dataset)
    check_count(dataset, str(path), at_least)
    return dataset


def check_count(images: Images, what: str, at_least: int = SMALLEST) -> None:
    """Refuse too few images.

    Raises:
        UserError: there are fewer.
    """
    if len(images) < at_least:
        raise UserError(
            f"{what} has only {len(images)} of the at least {at_least} images that are needed here"
        )


def read_real(
    path_to_data: str,
    path_to_test: str | None,
    *,
    size: tuple[int, int] | None,
    channels: int,
    val_fraction: float,
    seed: int,
) -> tuple[Part, Part]:
    """Real images of a training, and real images that it has not seen.

    Args:
        path_to_data: CSV of the first.
        path_to_test: CSV of the second; without it they are the validation rows of the first.
        size: height and width to resize and crop to; None: what all images have.
        channels: 1, 3 or 4.
        val_fraction, seed: of the training's split, where the CSV has no column split.

    Raises:
        UserError: see `ImageDataset`; too few images.
    """
    real = read_images(path_to_data, size, channels, SMALLEST)
    if path_to_test:
        test = read_images(path_to_test, real.size, channels, SMALLEST)
        return Part.whole(real), Part.whole(test)
    train, held_out = split_rows(real.rows, val_fraction=val_fraction, seed=seed)
    if min(len(train), len(held_out)) < SMALLEST:
        raise UserError(
            f"{path_to_data} has {len(held_out)} validation images, too few to compare with; give "
            "others by --path_to_test"
        )
    return Part(real, train), Part(real, held_out)
