"""CSV of images to batches of image tensors in [-1, 1]."""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from utils.cli import UserError, first_few
from utils.data.augmentation import Augmentation
from utils.data.decoding import MAX_PIXELS, TOO_MANY_PIXELS, Header, read_header, read_image
from utils.data.table import read_csv, split_rows
from utils.data.workers import read_batches

CHUNK = 256  # files that a process reads at a time
SKIPPED = "skipped.csv"


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are cut."""

    path_to_data: str = field(
        metadata={"help": "CSV with columns image_path[,label][,split]", "metavar": "CSV"}
    )
    val_fraction: float = field(
        default=0.1, metadata={"help": "share of the images for validation, without a split column"}
    )
    random_crop: bool = field(
        default=False,
        metadata={"help": "train on random crops of images that are an eighth larger"},
    )
    horizontal_flip: bool = field(
        default=False, metadata={"help": "mirror half of the training images"}
    )
    allow_outside_paths: bool = field(
        default=False, metadata={"help": "accept image paths that leave the folder of the CSV"}
    )
    max_pixels: int = field(
        default=MAX_PIXELS, metadata={"help": "refuse image files whose header says more"}
    )
    skip_bad_images: int = field(
        default=0,
        metadata={"help": "leave out up to this many files that cannot be read as images"},
    )

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or self.skip_bad_images < 0:
            raise ValueError("max_pixels must be 1 or more, skip_bad_images must not be negative")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")


class ImageDataset:
    """The images of a CSV, decoded once into memory where they fit, else streamed from disk.

    Attributes:
        rows: the lines of the CSV, without those of bad images that were skipped.
        skipped: those rows' number (from 1), image_path and what is wrong with the file.
        size: height and width of an image in pixels.
        channels: 1, 3 or 4.
        canvas: height and width of the images as they are kept; larger than `size` where random
            crops are taken from them.
        pixels: (N, channels, *canvas), uint8, or None where the images are streamed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        column: str = "image_path",
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        random_crop: bool = False,
        allow_outside_paths: bool = False,
        max_pixels: int = MAX_PIXELS,
        skip_bad_images: int = 0,
        num_workers: int = -1,
        processes: int = 1,
        max_memory: int | None = None,
    ) -> None:
        """Read a CSV, check the header of every file, and decode all if that fits into memory.

        Args:
            path: the CSV.
            column: image_path, or condition_path for the pictures that come with the images.
            size: height and width to resize and crop to; None: what all images have.
            channels: 1, 3 or 4; None: 1 if all images are grey, 4 if all have an alpha channel,
                else 3.
            random_crop: keep the images an eighth larger, for random crops of `size`.
            allow_outside_paths: see `read_csv`.
            max_pixels: more in the header of a file make it a bad one.
            skip_bad_images: leave out up to this many files that cannot be read as images. To
                find them all now, images that do not fit into memory are decoded once as well.
            num_workers: processes that decode; below 0 as many as there are cores, up to 16.
            processes: how many processes share this machine's memory.
            max_memory: bytes that the images may take; None: half of what is free.

        Raises:
            UserError: see `read_csv`; files that are no images or, in memory, cannot be decoded;
                sizes that differ without `size`; a CSV without the column; a process that
                decodes dies or hangs.
        """
        self.path = Path(path)
        self.rows = read_csv(path, allow_outside_paths=allow_outside_paths)
        self.names = [getattr(row, column) for row in self.rows]
        if not all(self.names):
            raise UserError(f"{path} has no column {column}; add it, with a file for each image")
        self.files = [str(self.path.parent / name) for name in self.names]
        self.num_workers = min(16, os.cpu_count() or 1) if num_workers < 0 else num_workers
        self.max_pixels, self._to_skip = max_pixels, skip_bad_images
        self.skipped: list[tuple[int, str, str]] = []
        self._numbers = range(len(self.rows))  # of the rows in the CSV
        headers = self._headers()
        self.size = size or _common_size(self.path, self.names, headers)
        self.channels = channels or _common_channels(headers)
        margin = 9 / 8 if random_crop else 1
        self.canvas = round(self.size[0] * margin), round(self.size[1] * margin)
        self.pixels: Tensor | None = None
        if max_memory is None:
            max_memory = psutil.virtual_memory().available // (2 * processes)
        if self.size_in_memory <= max_memory:
            self.pixels = torch.empty(len(self), self.channels, *self.canvas, dtype=torch.uint8)
        if self.pixels is not None or skip_bad_images:
            self._decode_all()

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        kept = "in memory" if self.pixels is not None else f"streamed by {self.num_workers} workers"
        return (
            f"{self.path}: {len(self):,} images of {self.size[0]}x{self.size[1]} pixels, "
            f"{self.channels} channel{'s' if self.channels > 1 else ''}, {kept} "
            f"({self.size_in_memory / 2**20:,.1f} MiB decoded)"
        )

    @property
    def size_in_memory(self) -> int:
        """Bytes of all images when decoded."""
        return len(self) * self.channels * self.canvas[0] * self.canvas[1]

    def batches(
        self,
        batches_of_rows: Sequence[Tensor],
        device: torch.device,
        augmentation: Augmentation | None = None,
    ) -> Iterator[Tensor]:
        """The images of each batch of row numbers, as (B, channels, *size) float in [-1, 1].

        Raises:
            UserError: a file that cannot be decoded, named with its row.
        """
        for rows, images in zip(batches_of_rows, self._canvases(batches_of_rows), strict=True):
            if augmentation is not None:
                images = augmentation.apply(images, rows, self.size, len(self))
            if images.shape[2:] != self.size:  # what is not cropped at random is cut in the middle
                top, left = (
                    canvas - side for canvas, side in zip(self.canvas, self.size, strict=True)
                )
                images = images[..., top // 2 :, left // 2 :][..., : self.size[0], : self.size[1]]
            images = images.to(device, non_blocking=True).float().div_(127.5).sub_(1)
            yield images.contiguous(memory_format=torch.channels_last)

    def _canvases(self, batches_of_rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """(B, channels, *canvas), uint8, of each batch of row numbers."""
        if self.pixels is not None:
            for rows in batches_of_rows:
                yield self.pixels[rows]
            return
        lists = [rows.tolist() for rows in batches_of_rows]
        batches = read_batches(self._decode, self.files, lists, self.num_workers, self.name)
        for rows, images in zip(lists, batches, strict=True):
            found = zip(rows, images, strict=True)
            self._refuse({row: image for row, image in found if isinstance(image, str)})
            yield torch.from_numpy(np.stack(images))

    def write_skipped(self, folder: Path, name: str = SKIPPED) -> None:
        """List the files that were skipped in a CSV, and say so; nothing without any."""
        if not self.skipped:
            return
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "image_path", "complaint"])
            writer.writerows(self.skipped)
        print(f"skipped {len(self.skipped):,} bad images, listed in {folder / name}")

    @property
    def _decode(self) -> Callable[[str], np.ndarray | str]:
        settings = {"channels": self.channels, "size": self.canvas}
        return partial(read_image, **settings, max_pixels=self.max_pixels)

    def _headers(self) -> list[Header]:
        headers, bad = [], {}
        for header in self._each(partial(read_header, max_pixels=self.max_pixels), "checking"):
            if isinstance(header, str):
                bad[len(headers) + len(bad)] = header
            else:
                headers.append(header)
        self._leave_out(bad)
        return headers

    def _decode_all(self) -> None:
        """Fill `pixels`, if there are any, without those of bad files."""
        good, bad = 0, {}
        for image in self._each(self._decode, "decoding"):
            if isinstance(image, str):
                bad[good + len(bad)] = image
                continue
            if self.pixels is not None:
                self.pixels.numpy()[good] = image
            good += 1
        self._leave_out(bad)
        if self.pixels is not None:
            self.pixels = self.pixels[:good]

    def _each(self, read: Callable[[str], Any], title: str) -> Iterator[Any]:
        """read(file) of each file, in order; by processes where there is much."""
        pieces = [range(len(self))[start : start + CHUNK] for start in range(0, len(self), CHUNK)]
        num_workers = self.num_workers if self.num_workers > 1 and len(pieces) > 3 else 0
        with tqdm(total=len(self), desc=title, unit=" images", disable=None, leave=False) as bar:
            for results in read_batches(read, self.files, pieces, num_workers, self.name):
                yield from results
                bar.update(len(results))

    def name(self, row: int) -> str:
        """What to call a row of the data set in a message: as in the CSV, with its file."""
        return f"row {self._numbers[row] + 1} {self.names[row]}"

    def _leave_out(self, bad: dict[int, str]) -> None:
        """Take rows out of the data set, if so many may be skipped."""
        if not bad:
            return
        if len(self.skipped) + len(bad) > self._to_skip or len(bad) == len(self):
            self._refuse(bad)
        for row, complaint in bad.items():
            self.skipped.append((self._numbers[row] + 1, self.names[row], complaint))
        kept = [row for row in range(len(self)) if row not in bad]
        self._numbers = [self._numbers[row] for row in kept]
        self.rows = [self.rows[row] for row in kept]
        self.names = [self.names[row] for row in kept]
        self.files = [self.files[row] for row in kept]

    def _refuse(self, bad: dict[int, str]) -> None:
        """Raise if there are bad files, by row."""
        if bad:
            count = len(bad) + len(self.skipped)
            named = first_few([f"{self.name(row)} ({text})" for row, text in bad.items()])
            total = len(self) + len(self.skipped)
            ways = ["replace them", "take them out of the CSV"]
            if TOO_MANY_PIXELS in bad.values():
                ways.insert(0, "raise --max_pixels if you trust them")
            if count < total:  # to leave out all of them would be no way
                leave = f"leave them out: --skip_bad_images {count}"
                ways.append(f"where a script has the flag, {leave}")
            raise UserError(
                f"{count} of {total} files in {self.path} cannot be read as images: {named}; "
                f"{', '.join(ways[:-1])}, or {ways[-1]}"
            )


def read_images(
    data: DataConfig,
    *,
    size: tuple[int, int] | None,
    channels: int | None,
    seed: int,
    num_workers: int,
    processes: int,
) -> tuple[ImageDataset, Tensor, Tensor]:
    """The images of a training, and the rows of them to train on and to validate.

    Raises:
        UserError: see `ImageDataset`.
    """
    dataset = ImageDataset(
        data.path_to_data,
        size=size,
        channels=channels,
        random_crop=data.random_crop,
        allow_outside_paths=data.allow_outside_paths,
        max_pixels=data.max_pixels,
        skip_bad_images=data.skip_bad_images,
        num_workers=num_workers,
        processes=processes,
    )
    parts = split_rows(
        dataset.rows, val_fraction=data.val_fraction, seed=seed, folder=dataset.path.parent
    )
    return dataset, *parts


def _common_size(path: Path, names: Sequence[str], headers: Sequence[Header]) -> tuple[int, int]:
    """The size that all images have."""
    sizes: dict[tuple[int, int], int] = {}
    for row, header in enumerate(headers):
        sizes.setdefault(header.size, row)
    if len(sizes) > 1:
        found = [f"{h}x{w} ({names[row]})" for (h, w), row in sizes.items()]
        raise UserError(
            f"the images in {path} have {len(sizes)} sizes: {first_few(found)}; "
            "--image_size H,W resizes and crops them to one"
        )
    return next(iter(sizes))


def _common_channels(headers: Sequence[Header]) -> int:
    if all(header.alpha for header in headers):
        return 4
    return 1 if all(header.grey for header in headers) else 3
