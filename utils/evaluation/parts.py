"""The images that an evaluation compares: rows of data sets, read and checked."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.images import ImageDataset
from utils.data.table import epoch_order, split_rows
from utils.evaluation.classifier import Images
from utils.evaluation.neighbours import DENSITY_K
from utils.provenance import Split

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


class Real(NamedTuple):
    """Real images of a training, real images that it has not seen, and how these were told apart.

    Attributes:
        split: `held_out`, in words; val_fraction and seed where they decided.
    """

    train: Part
    held_out: Part
    split: dict[str, Any]


def read_images(
    path: str | Path,
    flag: str,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    at_least: int = 2,
    **options: Any,
) -> ImageDataset:
    """The images of a CSV, see `ImageDataset`, which takes the options.

    Raises:
        UserError: see there; no such CSV, which `flag` named; too few images for figures that
            mean something.
    """
    if not Path(path).is_file():
        raise UserError(f"no such CSV file: {path}; {flag} takes a CSV of image paths")
    dataset = ImageDataset(path, size=size, channels=channels, **options)
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
    split: Split | None,
    samples: Images,
    *,
    resize: bool = False,
    **options: Any,
) -> Real:
    """Real images of a training, and real images that it has not seen.

    Args:
        path_to_data: CSV of the first.
        path_to_test: CSV of the second; without it they are the validation rows of the first.
        split: of the training, None if it is not known; needed where the CSV has no column split.
        samples: with which they are to be compared.
        resize: bring the real images to the size of the samples.
        options: of `ImageDataset`.

    Raises:
        UserError: see `ImageDataset`; too few images, or not of the size of the samples; nothing
            says which the training has seen.
    """
    size, channels = samples.size if resize else None, samples.channels
    real = read_images(path_to_data, "--path_to_data", size, channels, SMALLEST, **options)
    if real.size != samples.size:
        sizes = ["x".join(map(str, images.size)) for images in (real, samples)]
        raise UserError(
            f"the images in {path_to_data} have {sizes[0]} pixels, the samples {sizes[1]}; bring "
            "both to one size by --image_size H,W"
        )
    if path_to_test:
        test = read_images(path_to_test, "--path_to_test", real.size, channels, SMALLEST, **options)
        return Real(Part.whole(real), Part.whole(test), {"held_out": "path_to_test"})
    told = {"held_out": "column split of path_to_data"}
    if not real.rows[0].split:
        if split is None:
            raise UserError(
                f"nothing says which images of {path_to_data} the training has seen; add others by "
                "--path_to_test, the tokenizer by --model_dir, or a column split"
            )
        told = {"held_out": "drawn from path_to_data as the training did", **split._asdict()}
    train, held_out = split_rows(
        real.rows,
        val_fraction=split.val_fraction if split else 0.0,
        seed=split.seed if split else 0,
        folder=real.path.parent,
    )
    if min(len(train), len(held_out)) < SMALLEST:
        raise UserError(
            f"{path_to_data} has {len(held_out)} validation images, too few to compare with; give "
            "others by --path_to_test"
        )
    return Real(Part(real, train), Part(real, held_out), told)
