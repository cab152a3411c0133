"""Data sources: the rows of a data set, whatever its form. Each form is one file of this folder.

A source file defines two functions; adding the file here is all that a new form needs:

    accepts(path: Path) -> bool          whether it reads what is at the path
    read_rows(path: Path) -> list[Row]   its rows, with file paths relative to `root_of(path)`
"""

import gc
import hashlib
import importlib
import json
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError
from utils.files import sha256
from utils.progress import ProgressBar

SPLITS = ("train", "val")
FILE_COLUMNS = ("image_path", "condition_path")


class Row(NamedTuple):
    """One image of a data set; all but image_path are "" where the source does not have them."""

    image_path: str  # relative to the root of the source
    label: str
    split: str  # train or val
    condition_path: str = ""  # an image that comes with it, such as its segmentation
    caption: str = ""


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A million rows hold no cycles, but looking for some takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_garbage_collection()
def read_rows(path: str | Path, *, allow_outside_paths: bool = False) -> list[Row]:
    """The rows of a data set, with all files checked to exist.

    A UserError for nothing readable at the path, no rows, files that are missing or outside the
    root folder, or one file on both sides of the split.
    """
    path = Path(path)
    rows = _source_of(path).read_rows(path)
    if not rows:
        raise UserError(f"{path} lists no images; add at least one")
    from utils.data.finding import find_files  # only where there are images

    for column in FILE_COLUMNS:
        number = Row._fields.index(column)
        names = dict.fromkeys(filter(None, map(itemgetter(number), rows)))
        if respelled := find_files(path, root_of(path), names, allow_outside_paths):
            rows = [
                row._replace(**{column: respelled.get(row[number], row[number])}) for row in rows
            ]
    first: dict[str, Row] = {}
    for row in rows if rows[0].split else ():
        other = first.setdefault(_normal(row.image_path), row)
        if other.split != row.split:
            raise UserError(
                f"{path}: {other.image_path} ({other.split}) and {row.image_path} ({row.split}) "
                "are the same file; put it on one side of the split"
            )
    return rows


def _normal(name: str) -> str:
    """A path in the spelling that all of its spellings share."""
    return os.path.normpath(name) if "./" in name or "//" in name else name


@cache
def note(line: str) -> None:
    """Print a line about the data once."""
    print(line)


def root_of(path: str | Path) -> Path:
    """The folder that the file paths of a source are relative to."""
    path = Path(path)
    return path if path.is_dir() else path.parent


def digest(path: str | Path) -> str:
    """The SHA-256 of a source: of its file, or of its rows where it is a folder."""
    path = Path(path)
    if not path.is_dir():
        return sha256(path)
    rows = [row[:4] for row in _source_of(path).read_rows(path)]  # folders have no captions
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _source_of(path: Path) -> ModuleType:
    """The first file of this folder that accepts the path; else csv.py."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    sources = [importlib.import_module(name) for name in names]
    default = importlib.import_module(f"{__name__}.csv")
    return next((source for source in sources if source.accepts(path)), default)


def split_rows(rows: Sequence[Row], *, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers for training and for validation, two ascending int64 tensors.

    The split column decides where there is one. Otherwise `val_fraction` of the files, at least
    one, are chosen by a hash of seed and path, so that all rows of one file are on the same side.
    """
    if rows[0].split:
        is_val = torch.tensor([row.split == "val" for row in rows])
    else:
        names = [_normal(row.image_path) for row in rows]
        files = list(dict.fromkeys(names))
        hashes: list[bytes] = []
        starts = range(0, len(files), 1000)
        for start in ProgressBar(starts, "splitting", unit="k files", leave=False, delay=1):
            block = files[start : start + 1000]
            hashes += [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in block]
        count = round(val_fraction * len(files)) or (val_fraction > 0 and len(files) > 1)
        lowest = np.frombuffer(b"".join(hashes), ">u8")[::4].argsort()[:count]
        chosen = set(map(files.__getitem__, lowest.tolist()))
        is_val = torch.from_numpy(np.fromiter(map(chosen.__contains__, names), bool))
    return (~is_val).nonzero()[:, 0], is_val.nonzero()[:, 0]


def preview_first(rows: Sequence[Row], candidates: Tensor, count: int) -> Tensor:
    """The row numbers `candidates`, of which the first `count` are a fixed choice for pictures.

    They are random, of all classes in turn; the others follow in their order.
    """
    seen: Counter[str] = Counter()
    ranks = {}
    for row in epoch_order(candidates, 0, 0).tolist() if len(candidates) > count else ():
        ranks[row] = seen[rows[row].label]  # so many of its class come before
        seen[rows[row].label] += 1
    chosen = sorted(ranks, key=ranks.__getitem__)[:count]
    return torch.tensor(list(dict.fromkeys([*chosen, *candidates.tolist()])))


def epoch_order(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """`rows` in the order of one epoch, a function of seed and epoch alone."""
    return rows[torch.randperm(len(rows), generator=seeded_generator("order", seed, epoch))]


def seeded_generator(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """The random number generator of one purpose in one epoch."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
