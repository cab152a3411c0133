"""Data sources: the rows of a data set, whatever its form. Each form is one file of this folder.

A source file defines two functions; adding the file here is all that a new form needs:

    accepts(path: Path) -> bool              whether it reads what is at the path
    read_rows(path: Path) -> Sequence[Row]   its rows, with file paths relative to `root_of(path)`

and a third where the images are inside of the file. Row a.png of x.tar has the path x.tar/a.png:

    read_file(path: Path, name: str) -> bytes   the content of one of them
"""

import hashlib
import importlib
import io
import itertools
import json
import os
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.addresses import download_named
from utils.cli import UserError, first_few
from utils.files import sha256

SPLITS = ("train", "val")
BLOCK = 4  # shards whose rows are shuffled together
MAPPED = 128  # files that an array has open: each takes one of the 1,024 of a process
FILE_COLUMNS = ("image_path", "condition_path")


class Row(NamedTuple):
    """One image of a data set; all but image_path are "" where the source does not have them."""

    image_path: str  # relative to the root of the source
    label: str
    split: str  # train or val
    condition_path: str = ""  # an image that comes with it, such as its segmentation
    caption: str = ""


class Rows(Sequence[Row]):
    """The rows of a data set as columns of text, in half the memory of a list of `Row`."""

    def __init__(self, columns: Mapping[str, Sequence[str]]) -> None:
        """`columns` by name; the values of those that are missing are ""."""
        empty = [""] * len(columns["image_path"])
        self.columns = {name: columns.get(name, empty) for name in Row._fields}

    def __len__(self) -> int:
        return len(self.columns["image_path"])

    def __getitem__(self, chosen: Any) -> Any:
        found = [values[chosen] for values in self.columns.values()]
        return [*map(Row, *found)] if isinstance(chosen, slice) else Row(*found)

    def __iter__(self) -> Iterator[Row]:
        return map(Row, *self.columns.values())


class ShardedArray:
    """Several .npy files of arrays (n, ...), one after the other as one (N, ...).

    They stay on disk: array[rows], or array[rows, others] as in NumPy, gathers a tensor by memory
    map; rows are an integer, a slice, or integers (B,). `starts` has the first row of each file. A
    UserError if a file changes meanwhile.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._open = paths, lru_cache(MAPPED)(self._read)
        self._times = [path.stat().st_mtime_ns for path in paths]
        starts = np.cumsum([0, *map(len, self.parts())])
        first = self._open(0)
        self.shape: tuple[int, ...] = (int(starts[-1]), *first.shape[1:])
        self.dtype, self.starts = first.dtype, starts[:-1].tolist()

    def _read(self, number: int) -> np.ndarray:
        path = self._paths[number]
        if not path.exists() or path.stat().st_mtime_ns != self._times[number]:
            raise UserError(f"{path} has changed since it was first read; start again")
        return np.lib.format.open_memmap(path, mode="r")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        first, *others = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice):
            first = range(*first.indices(len(self)))
        rows = np.atleast_1d(np.asarray(first))
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        found = np.empty((len(rows), *self.shape[1 + len(others) :]), self.dtype)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            places = rows[chosen] - self.starts[shard]
            found[chosen] = self._open(shard)[(places, *(np.asarray(x)[chosen] for x in others))]
        return torch.from_numpy(found[0] if isinstance(first, int) else found)

    def parts(self) -> Iterator[np.ndarray]:
        """The arrays one by one."""
        return map(self._read, range(len(self._paths)))


def column_of(rows: Sequence[Row], name: str) -> Sequence[str]:
    """The values of a column."""
    return rows.columns[name] if isinstance(rows, Rows) else [getattr(row, name) for row in rows]


def read_rows(path: str | Path, *, allow_outside_paths: bool = False) -> Rows:
    """The rows of a data set, with all files checked to exist.

    A UserError for nothing readable at the path, no rows, files that are missing or outside the
    root folder, or one file on both sides of the split.
    """
    from utils.data import finding  # only where there are images

    parts = finding.expand(path)
    has_split = {"train", "val"} <= {*parts.values()}
    left_out = [str(part) for part, split in parts.items() if has_split and not split]
    if left_out:
        note(f"{path}: {len(left_out):,} other files are left out: {first_few(left_out)}")
    root, columns = root_of(path), {name: list[str]() for name in Row._fields}
    for part, split in parts.items():
        if split or not has_split:
            found = _read_part(part, root, allow_outside_paths)
            found["split"] = [own or (split if has_split else "") for own in found["split"]]
            for name, values in columns.items():
                values += found[name]
    rows = Rows(columns)
    if not rows:
        raise UserError(f"{path} lists no images; add at least one")
    if "" in columns["split"] and any(columns["split"]):
        raise UserError(f"{path}: some rows have a split; give one to all of them, or to none")
    if rows[0].split:
        splits: dict[str, str] = {}
        for name, split in zip(columns["image_path"], columns["split"], strict=True):
            if (other := splits.setdefault(_normal(name), split)) != split:
                same = next(x for x in columns["image_path"] if _normal(x) == _normal(name))
                raise UserError(
                    f"{path}: {same} ({other}) and {name} ({split}) are the same file; put it on "
                    "one side of the split"
                )
    return rows


def _read_part(path: Path, root: Path, allow_outside_paths: bool) -> dict[str, list[str]]:
    """The columns of one source, with all files checked to exist, and paths relative to `root`."""
    from utils.data.finding import find_files

    source = _source_of(path)
    rows = source.read_rows(path)
    columns = {name: [*column_of(rows, name)] for name in Row._fields}
    inside = f"{path.name}/" if hasattr(source, "read_file") else "\0"
    folder = os.path.relpath(root_of(path), root)
    for name in FILE_COLUMNS:
        files = [file for file in columns[name] if file and not file.startswith(inside)]
        download_named(root_of(path), files)
        if respelled := find_files(path, root_of(path), files, allow_outside_paths):
            columns[name] = [respelled.get(file, file) for file in columns[name]]
        if folder != ".":
            columns[name] = [x and os.path.normpath(os.path.join(folder, x)) for x in columns[name]]
    return columns


def column_name(name: str) -> str:
    """A known column in any spelling, or the name as it is."""
    known = name.strip().casefold().replace(" ", "_").replace("-", "_")
    return known if known in Row._fields else name.strip()


def check_rows(path: Path, columns: Collection[str], rows: Sequence[Row]) -> None:
    """A UserError for an empty value in a column that must have one, or an unknown split."""
    for name in {"split", *FILE_COLUMNS}.intersection(columns):
        for number, value in enumerate(column_of(rows, name), 1):
            if not value:
                raise UserError(f"{path} row {number}: {name} is empty; fill it in")
            if name == "split" and value not in SPLITS:
                raise UserError(f"{path} row {number}: split is {value!r}; use train or val")


def open_file(file: str | Path) -> BinaryIO:
    """Open a file that a row names, also one inside of another, such as x.tar/a.png."""
    try:
        return open(file, "rb")
    except NotADirectoryError:  # for a plain file, nothing more is done
        container = container_of(os.path.dirname(file))
        return io.BytesIO(_reader(container)(str(file)[len(container) + 1 :]))


def container_of(folder: str) -> str:
    """The file that a row's folder is or is inside of, such as x.tar for x.tar/cats; else ""."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return "" if os.path.isdir(folder) else folder


@cache
def _reader(container: str) -> Callable[[str], bytes]:
    return partial(_source_of(Path(container)).read_file, Path(container))


def _normal(name: str) -> str:
    """A path in the spelling that all of its spellings share."""
    return os.path.normpath(name) if "./" in name or "//" in name else name


@cache
def note(line: str) -> None:
    """Print a line about the data once."""
    print(line)


def root_of(path: str | Path) -> Path:
    """The folder that the file paths of a source are relative to."""
    from utils.data.finding import expand

    parts = [Path(path)] if os.path.exists(path) else [x.absolute() for x in expand(path)]
    return Path(os.path.commonpath([x if x.is_dir() else x.parent for x in parts]))


def digest(path: str | Path) -> str:
    """The SHA-256 of a source: of its file, or of its rows where it is a folder or holds images."""
    from utils.data.finding import expand

    parts = list(expand(path))
    if len(parts) == 1 and parts[0].is_file() and not hasattr(_source_of(parts[0]), "read_file"):
        return sha256(parts[0])
    # Captions, which folders do not have, count where there are some.
    rows = [row if row.caption else row[:4] for x in parts for row in _source_of(x).read_rows(x)]
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
        is_val = torch.tensor([split == "val" for split in column_of(rows, "split")])
    else:
        names = column_of(rows, "image_path")
        digests = (hashlib.sha256(f"{seed}/{_normal(name)}".encode()).digest() for name in names)
        hashes = np.fromiter(digests, "S8", len(names)).view(">u8").astype(np.uint64)
        files, ranks = np.unique(hashes, return_inverse=True)
        count = round(val_fraction * len(files)) or (val_fraction > 0 and len(files) > 1)
        is_val = torch.from_numpy(ranks < count)
    return (~is_val).nonzero()[:, 0], is_val.nonzero()[:, 0]


def preview_first(rows: Sequence[Row], candidates: Tensor, count: int) -> Tensor:
    """The row numbers `candidates` in a fixed random order; the first `count` are for pictures.

    Those are of all classes in turn. If there are no more than `count`, their order stays.
    """
    if len(candidates) <= count:
        return candidates
    numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)
    labels, order = column_of(rows, "label"), epoch_order(candidates, 0, 0).tolist()
    ranks = {row: next(numbers[labels[row]]) for row in order}  # among those of its class
    chosen = sorted(ranks, key=ranks.__getitem__)[:count]
    return torch.tensor(list(dict.fromkeys([*chosen, *ranks])))


def epoch_order(rows: Tensor, seed: int, epoch: int, starts: Sequence[int] = ()) -> Tensor:
    """`rows` in the order of one epoch, a function of seed and epoch alone.

    With the first row of each shard in `starts`, shards are in random order, and rows within
    blocks of `BLOCK` shards, so that at any time few of them are read.
    """
    generator = seeded_generator("order", seed, epoch)
    order = torch.randperm(len(rows), generator=generator)
    if len(starts) <= BLOCK:  # a single block
        return rows[order]
    blocks = torch.randperm(len(starts), generator=generator) // BLOCK  # of each shard
    shards = torch.bucketize(rows[order], torch.as_tensor(starts), right=True) - 1
    return rows[order[blocks[shards].argsort(stable=True)]]


def seeded_generator(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """The random number generator of one purpose in one epoch."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
