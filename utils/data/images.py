"""Images of a data source as batches in [-1, 1], from memory or streamed by DataLoader workers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.cli import Checked, UserError, first_few, flag
from utils.data import decoding, sources
from utils.data.cache import PixelCache
from utils.data.decoding import EIGHT_BITS, MAX_PIXELS, Header
from utils.data.sources import Rows, column_of, read_rows, root_of, seeded_generator
from utils.data.sources.csv import write_table
from utils.data.workers import available_cores, available_memory, load_files, shared_memory
from utils.progress import ProgressBar

CHUNK = 256  # files that a worker reads at a time, where all files are read
CACHED_FILES = 1000  # of so many or fewer, pixels are not cached
SAMPLED_FILES = 64  # from which the range of values is decided
SKIPPED = "skipped.csv"


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Checked):
    """How image files are read: the flags of every script that reads images."""

    allow_outside_paths: bool = flag(False, "accept image paths that leave the folder of the CSV")
    max_pixels: int = flag(MAX_PIXELS, "refuse image files whose header says more", min=1)
    skip_bad_images: int = flag(0, "leave out up to this many images that cannot be read", min=0)
    num_workers: int = flag(-1, "processes that decode images; -1: one a core")
    stream: bool = flag(False, "decode images again in each epoch, not once into memory")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImageConfig):
    """The images of a training."""

    path_to_data: str = flag(
        "",
        "CSV with columns image_path[,label][,split], folder of classes, Parquet, tar, or a URL",
        metavar="DATA",
    )
    val_fraction: float = flag(0.1, "share for validation without a split column", above=0, below=1)
    random_crop: bool = flag(False, "train on random crops of images that are an eighth larger")
    horizontal_flip: bool = flag(False, "mirror half of the training images")


class Augmentation(NamedTuple):
    """The random changes to the images of one epoch, a function of seed, epoch and row."""

    horizontal_flip: bool
    random_crop: bool
    seed: int
    epoch: int


@dataclass
class Headers:
    """What the headers of all files of a data set say."""

    sizes: dict[tuple[int, int], str] = field(default_factory=dict)  # with a file of each
    grey: bool = True
    alpha: bool = True

    def add(self, header: Header | str, name: str) -> None:
        """Count a header, unless it is the complaint about a bad file."""
        if isinstance(header, Header):
            self.sizes.setdefault(header.size, name)
            self.grey, self.alpha = self.grey and header.grey, self.alpha and header.alpha

    @property
    def channels(self) -> int:
        return 4 if self.alpha else 1 if self.grey else 3

    def common_size(self, path: str | Path) -> tuple[int, int]:
        """The size of all files; of one pixel, if none is known."""
        if len(self.sizes) > 1:
            found = [f"{height}x{width} ({name})" for (height, width), name in self.sizes.items()]
            raise UserError(
                f"the images in {path} are not of one size: {first_few(found)}; "
                "--image_size H,W resizes and crops them to one"
            )
        return next(iter(self.sizes), (1, 1))


class ImageDataset:
    """The images of a data source, decoded into memory where they fit and cached, else streamed.

    Attributes:
        rows: of the source, without those of bad images that were skipped.
        skipped: the number (from 1), image_path and complaint of each row that was.
        pixels: (N, channels, *resize_size), uint8, or None where the images are streamed.
    """

    def __init__(
        self,
        path: str | Path,
        config: ImageConfig | None = None,
        *,
        column: str = "image_path",
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        value_range: tuple[float, float] | None = None,
        resampling: str = "",
        random_crop: bool = False,
        max_memory: int | None = None,
    ) -> None:
        """Read the rows, and decode all files if they fit into memory, else read their headers.

        Args:
            config: how files are read. To find up to `skip_bad_images` bad ones before training,
                images that do not fit into memory are decoded once as well.
            column: image_path, or condition_path for the conditioning images.
            size: height and width to resize and crop to; None: the size of all images.
            channels: 1, 3 or 4; None: 1 if all images are grey, 4 if all have alpha, else 3.
            value_range, resampling: see `read_image`; None, "": `common_range` of a sample.
            random_crop: keep the images an eighth larger, for random crops of `size`.
            max_memory: bytes for the images; None: half of what is free, for all processes here.

        A UserError for what `read_rows` refuses, bad files, different sizes without `size`, a
        missing column, and a worker that dies.
        """
        self.path, config = path, config or ImageConfig()
        self.rows = read_rows(path, allow_outside_paths=config.allow_outside_paths)
        self._column, self._skippable = column, config.skip_bad_images
        if not all(column_of(self.rows, column)):
            raise UserError(f"{path} has no column {column}; add it, with a file for each image")
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.num_workers = config.num_workers
        if self.num_workers < 0:
            self.num_workers = min(16, max(1, available_cores() // processes))
        self.skipped: list[tuple[int, str, str]] = []
        self._numbers: Sequence[int] = range(1, len(self.rows) + 1)  # of the rows in the source

        if max_memory is None:
            max_memory = 0 if config.stream else available_memory() // (2 * processes)
        self._max_pixels, self._scale = config.max_pixels, 9 / 8 if random_crop else 1
        options = size, channels, value_range, resampling
        cache = None
        if max_memory and len(self) > CACHED_FILES:
            with suppress(OSError, ImportError):  # a file vanished; packages of unknown version
                reader = [decoding.VERSION, *(version(name) for name in ("pillow", "torchvision"))]
                reader += [self._scale, self._max_pixels, self._skippable]
                cache = PixelCache(self.files, self._containers(), reader)
        cached = cache and cache.read(options)
        if cached and cached[0].nbytes <= max_memory:
            self.pixels, (self.size, self.channels, self.value_range, self.resampling), bad = cached
            if bad:
                self._skip(bad)
            return
        read_header = partial(decoding.read_header, max_pixels=self._max_pixels)
        sample = range(len(self))[:: -(-len(self) // SAMPLED_FILES)]
        files = self.files[:: sample.step]
        values = [decoding.sample_values(file, max_pixels=self._max_pixels) for file in files]
        found = decoding.common_range([x for x in values if not isinstance(x, str)])
        self.value_range, self.resampling = value_range or found[0], resampling or found[1]

        # One pass reads headers and pixels as if all files were like the sample; else another does.
        seen, chosen = Headers(), None
        for row, header in zip(sample, map(read_header, files), strict=True):
            seen.add(header, self._file_name(row))
        while chosen != (choice := (size or seen.common_size(path), channels or seen.channels)):
            chosen = self.size, self.channels = choice
            keep = self.size_in_memory <= max_memory
            seen = self._read_files(self._decode if keep or self._skippable else read_header, keep)
        if cache and self.pixels is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            bad = {number - 1: complaint for number, _, complaint in self.skipped}
            options_found = self.size, self.channels, self.value_range, self.resampling
            cache.write(options, self.pixels, options_found, bad)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        kept = "in memory" if self.pixels is not None else f"streamed by {self.num_workers} workers"
        low, high = self.value_range
        values = "" if (low, high) == EIGHT_BITS else f"values {low:g} to {high:g}, "
        nearest = "label maps (--resampling nearest), " if self.resampling == "nearest" else ""
        return (
            f"{self.path}: {len(self):,} images of {self.size[0]}x{self.size[1]} pixels, "
            f"{self.channels} channel{'s' if self.channels > 1 else ''}, {values}{nearest}{kept} "
            f"({self.size_in_memory / 2**20:,.1f} MiB decoded)"
        )

    @property
    def size_in_memory(self) -> int:
        """Bytes of all images when decoded."""
        return len(self) * self.channels * self.resize_size[0] * self.resize_size[1]

    def shard_starts(self, shuffle: str) -> list[int]:
        """The first row of each tar, Parquet or Arrow file; [0] without, or for auto in memory."""
        if self.pixels is not None and shuffle == "auto":
            return [0]
        names = self._containers()
        return [row for row, name in enumerate(names) if row == 0 or name != names[row - 1]]

    def _containers(self) -> list[str]:
        """The tar, Parquet or Arrow file of each row, "" for a file of its own."""
        folders = [os.path.dirname(file) for file in self.files]
        found = {folder: sources.container_of(folder) for folder in {*folders}}
        return [found[folder] for folder in folders]

    @property
    def files(self) -> list[str]:
        """The path of each row's file."""
        root = root_of(self.path)
        return [os.path.join(root, name) for name in column_of(self.rows, self._column)]

    def name(self, row: int) -> str:
        """The name of a row in messages: its number in the source, and its file."""
        return f"row {self._numbers[row]} {self._file_name(row)}"

    def _file_name(self, row: int) -> str:
        return column_of(self.rows, self._column)[row]

    def batches(
        self,
        batches_of_rows: Sequence[Tensor],
        device: torch.device,
        augmentation: Augmentation | None = None,
    ) -> Iterator[Tensor]:
        """The images of each batch of row numbers, as (B, channels, *size) float in [-1, 1].

        A UserError for a file that cannot be decoded, named with its row.
        """
        height, width = self.size
        spare = torch.tensor(self.resize_size) - torch.tensor(self.size)
        corners = (spare // 2).expand(len(self), 2)  # without random crops, the centre
        mirrored = torch.zeros(len(self), dtype=torch.bool)
        if augmentation is not None:
            generator = seeded_generator("augmentation", augmentation.seed, augmentation.epoch)
            random = torch.rand(len(self), 3, generator=generator)
            if augmentation.random_crop:
                corners = (random[:, :2] * (spare + 1)).long()
            if augmentation.horizontal_flip:
                mirrored = random[:, 2] < 0.5
        for rows, images in zip(batches_of_rows, self._resized(batches_of_rows), strict=True):
            if spare.any():
                places = zip(images, corners[rows].tolist(), strict=True)
                crops = [x[:, top : top + height, left : left + width] for x, (top, left) in places]
                images = torch.stack(crops)
            if mirrored.any():
                images = torch.where(mirrored[rows][:, None, None, None], images.flip(3), images)
            images = images.to(device, non_blocking=True).float().div_(127.5).sub_(1)
            yield images.contiguous(memory_format=torch.channels_last)

    def _resized(self, batches_of_rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """(B, channels, *resize_size), uint8, of each batch of row numbers."""
        if self.pixels is not None:
            yield from (self.pixels[rows] for rows in batches_of_rows)
            return
        lists = [rows.tolist() for rows in batches_of_rows]
        batches = load_files(self._decode, self.files, lists, self.num_workers)
        for numbers, images in zip(lists, batches, strict=True):
            bad = {n: x for n, x in zip(numbers, images, strict=True) if isinstance(x, str)}
            if bad:
                raise self._refusal(bad)
            pixels = np.stack([pixels for _, pixels in images])
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2)

    @property
    def resize_size(self) -> tuple[int, int]:
        """Height and width before cropping; larger than `size` for random crops."""
        return round(self.size[0] * self._scale), round(self.size[1] * self._scale)

    @property
    def _decode(self) -> Callable[[str], Any]:
        return partial(
            decoding.read_image,
            channels=self.channels,
            size=self.resize_size,
            max_pixels=self._max_pixels,
            value_range=self.value_range,
            resampling=self.resampling,
        )

    def _read_files(self, read: Callable[[str], Any], keep: bool) -> Headers:
        """The headers of all files; their pixels are kept, or read only to find bad files.

        Workers write pixels directly into memory that all processes share.
        """
        self.pixels = None  # of an earlier pass
        pixels = shared_memory((len(self), *self.resize_size, self.channels)) if keep else None
        read_into = partial(_read_into, pixels, read)
        lists = [piece.tolist() for piece in torch.arange(len(self)).split(CHUNK)]
        num_workers = self.num_workers if self.num_workers > 1 and len(lists) > 3 else 0
        batches = load_files(read_into, list(enumerate(self.files)), lists, num_workers)
        bar = ProgressBar(
            chain.from_iterable(batches), "reading", len(self), unit=" images", leave=False
        )
        headers, bad = Headers(), dict[int, str]()
        for row, header in enumerate(bar):
            headers.add(header, self._file_name(row))
            if isinstance(header, str):
                bad[row] = header
        if bad:
            kept = self._skip(bad)
            if pixels is not None:
                for new, row in enumerate(kept):
                    pixels[new] = pixels[row]
        self.pixels = None if pixels is None else pixels[: len(self)].permute(0, 3, 1, 2)
        return headers

    def _skip(self, bad: dict[int, str]) -> list[int]:
        """Leave out rows of bad files; all others. A UserError for more than may be left out."""
        if len(self.skipped) + len(bad) > self._skippable or len(bad) == len(self):
            raise self._refusal(bad)
        for row, complaint in bad.items():
            self.skipped.append((self._numbers[row], self._file_name(row), complaint))
        kept = [row for row in range(len(self)) if row not in bad]
        self._numbers = [self._numbers[row] for row in kept]
        self.rows = Rows({name: [x[row] for row in kept] for name, x in self.rows.columns.items()})
        return kept

    def _refusal(self, bad: dict[int, str]) -> UserError:
        """The error for bad files, by row."""
        count, total = len(bad) + len(self.skipped), len(self) + len(self.skipped)
        named = first_few([f"{self.name(row)} ({text})" for row, text in bad.items()])
        ways = ["replace them", "remove them from the CSV"]
        if decoding.TOO_MANY_PIXELS in bad.values():
            ways.insert(0, "raise --max_pixels if you trust them")
        if count < total:  # skipping all of them would leave nothing
            ways.append(f"where a script has the flag, leave them out: --skip_bad_images {count}")
        return UserError(
            f"{count} of {total} files in {self.path} cannot be read as images: {named}; "
            f"{', '.join(ways[:-1])}, or {ways[-1]}"
        )

    def write_skipped(self, folder: Path, name: str = SKIPPED) -> None:
        """List the files that were skipped, if any, in a CSV."""
        if self.skipped:
            write_table(folder / name, ("row", "image_path", "complaint"), self.skipped)
            print(f"skipped {len(self.skipped):,} bad images, listed in {folder / name}")


def _read_into(
    pixels: Tensor | None, read: Callable[[str], Any], item: tuple[int, str]
) -> Header | str:
    """The header of a file of a row, or why it cannot be read; its pixels are written."""
    row, file = item
    result = read(file)
    if isinstance(result, str | Header):
        return result
    if pixels is not None:
        pixels.numpy()[row] = result[1]
    return result[0]
