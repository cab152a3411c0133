"""CSV of images to batches of image tensors in [-1, 1]."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.cli import UserError, first_few
from utils.decoding import Header, complaint, decode_image, decode_images, read_headers
from utils.table import read_csv, seeded, split_rows

CHUNK = 256  # files that a process reads at a time


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

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")


class Augmentation(NamedTuple):
    """What changes from epoch to epoch in a training image: a function of seed, epoch and row."""

    horizontal_flip: bool
    random_crop: bool
    seed: int
    epoch: int

    def apply(self, images: Tensor, rows: Tensor, size: tuple[int, int], num_rows: int) -> Tensor:
        """(B, C, canvas height, canvas width) of the given rows -> (B, C, *size), uint8."""
        if not (self.random_crop or self.horizontal_flip):
            return images
        chance = _chances(self.seed, self.epoch, num_rows)[rows]
        if self.random_crop:
            spare = torch.tensor([images.shape[2] - size[0] + 1, images.shape[3] - size[1] + 1])
            corners = (chance[:, :2] * spare).long().tolist()
            images = torch.stack(
                [
                    image[:, top : top + size[0], left : left + size[1]]
                    for image, (top, left) in zip(images, corners, strict=True)
                ]
            )
        if self.horizontal_flip:
            images = torch.where((chance[:, 2] < 0.5)[:, None, None, None], images.flip(3), images)
        return images


@lru_cache(maxsize=1)
def _chances(seed: int, epoch: int, num_rows: int) -> Tensor:
    """Three random numbers for each row of an epoch, (num_rows, 3) in [0, 1)."""
    return torch.rand(num_rows, 3, generator=seeded("augmentation", seed, epoch))


class ImageDataset(Dataset):
    """The images of a CSV, decoded once into memory where they fit, else streamed from disk.

    Attributes:
        rows: the lines of the CSV.
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
            num_workers: processes that decode; below 0 as many as there are cores, up to 16.
            processes: how many processes share this machine's memory.
            max_memory: bytes that the images may take; None: half of what is free.

        Raises:
            UserError: see `read_csv`; files that are no images or, in memory, cannot be decoded;
                sizes that differ without `size`; a CSV without the column.
        """
        self.path = Path(path)
        self.rows = read_csv(path, allow_outside_paths=allow_outside_paths)
        self.names = [getattr(row, column) for row in self.rows]
        if not all(self.names):
            raise UserError(f"{path} has no column {column}; add it, with a file for each image")
        self.files = [str(self.path.parent / name) for name in self.names]
        self.num_workers = min(16, os.cpu_count() or 1) if num_workers < 0 else num_workers
        headers = self._headers()
        self.size = size or _common_size(self.path, self.names, headers)
        self.channels = channels or _common_channels(headers)
        margin = 9 / 8 if random_crop else 1
        self.canvas = round(self.size[0] * margin), round(self.size[1] * margin)
        self.pixels: Tensor | None = None
        if max_memory is None:
            max_memory = psutil.virtual_memory().available // (2 * processes)
        if self.size_in_memory <= max_memory:
            self._decode_all()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray | str:
        """(channels, *canvas), uint8, or what is wrong with the file."""
        try:
            return decode_image(self.files[row], self.channels, self.canvas)
        except Exception as error:  # Pillow raises nearly everything on damaged files
            return complaint(self.files[row], error)

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
        loader = DataLoader(
            self,
            batch_sampler=[rows.tolist() for rows in batches_of_rows],
            num_workers=self.num_workers,
            collate_fn=list,
        )
        for rows, images in zip(batches_of_rows, loader, strict=True):
            self._refuse_bad(dict(zip(rows.tolist(), images, strict=True)))
            yield torch.from_numpy(np.stack(images))

    def _decode_all(self) -> None:
        self.pixels = torch.empty(len(self), self.channels, *self.canvas, dtype=torch.uint8)
        decode = partial(decode_images, channels=self.channels, size=self.canvas)
        complaints: dict[int, str] = {}
        start = 0
        for pixels, bad in self._map(decode, "decoding"):
            self.pixels[start : start + len(pixels)] = torch.from_numpy(pixels)
            complaints |= {start + position: text for position, text in bad.items()}
            start += len(pixels)
        self._refuse_bad(complaints)

    def _headers(self) -> list[Header]:
        headers = [header for piece in self._map(read_headers, "checking") for header in piece]
        self._refuse_bad(dict(enumerate(headers)))
        return headers

    def _map(self, function: Callable[[list[str]], Any], title: str) -> Iterator[Any]:
        """function(files) of each CHUNK of files, in order; by processes where there is much."""
        pieces = [self.files[start : start + CHUNK] for start in range(0, len(self), CHUNK)]
        with ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(total=len(self), desc=title, unit=" images", disable=None, leave=False)
            )
            if self.num_workers > 1 and len(pieces) > 3:
                pool = stack.enter_context(ProcessPoolExecutor(self.num_workers))
                results = pool.map(function, pieces)
            else:
                results = map(function, pieces)
            for piece, result in zip(pieces, results, strict=True):
                yield result
                bar.update(len(piece))

    def _refuse_bad(self, images: dict[int, Any]) -> None:
        """Raise if what should be images (or headers), by row, is in truth a complaint."""
        bad = [
            f"row {row + 1} {self.names[row]} ({image})"
            for row, image in images.items()
            if isinstance(image, str)
        ]
        if bad:
            raise UserError(
                f"{len(bad)} of {len(self)} files in {self.path} cannot be read as images: "
                f"{first_few(bad)}; replace them or take them out of the CSV"
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
        num_workers=num_workers,
        processes=processes,
    )
    return dataset, *split_rows(dataset.rows, val_fraction=data.val_fraction, seed=seed)


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
