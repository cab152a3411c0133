"""The indices folder: grids of codebook indices, written completely or not at all, and checked.

    indices.npy    (N, h, w[, depth]) in the smallest unsigned type; indices-00000.npy, ... if large
    manifest.csv   image_path, label, split[, condition_path] of each grid
    meta.json      `IndicesMeta`
    sha256.json    the SHA-256 of each file
    indices.txt    on request: a line of space-separated indices for each grid

condition.npy and crops.npy, where present, are described in index_dataset.py.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError, one_line
from utils.data.sources import SPLITS, Row
from utils.data.sources.csv import read_table, to_rows, write_table
from utils.data.vocabulary import LARGEST_CODEBOOK, GridMeta
from utils.files import (
    CHECKSUMS,
    TABLE_BYTES,
    check_links,
    check_size,
    intact_folder,
    read_json,
    replace_folder,
    sha256,
    typed,
    verify,
)
from utils.provenance import Lineage, finished

META, MANIFEST = "meta.json", "manifest.csv"
SHARD_BYTES = 1 << 30  # of one .npy file


@dataclass(frozen=True)
class IndicesMeta(GridMeta):
    """meta.json: what the indices belong to.

    Attributes:
        depth: indices per latent position.
        gpt_run_id: the MLflow run of the GPT that sampled them, if one did.
        lineage: the commands up to the one that made them.
        condition: of the grids in condition.npy, None without them.
    """

    depth: int = 1
    gpt_run_id: str = ""
    lineage: Lineage = ()
    condition: GridMeta | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"depth must be 1 or more, got {self.depth}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one grid's indices: (h, w), or (h, w, depth) for a depth above 1."""
        return _shape(self.latent_dim, self.depth)


@dataclass(frozen=True)
class Indices:
    """Grids of codebook indices and the rows they belong to.

    Attributes:
        shards: arrays (n, h, w[, depth]) of the smallest unsigned type, memory-mapped if read.
        rows: one for each grid, in order.
        meta: None for a plain text file.
    """

    shards: Sequence[np.ndarray]
    rows: Sequence[Row]
    meta: IndicesMeta | None

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def latent_dim(self) -> tuple[int, int]:
        """Rows and columns (h, w) of a grid."""
        return self.shards[0].shape[1:3]

    @property
    def depth(self) -> int:
        """Indices per latent position."""
        return self.meta.depth if self.meta is not None else 1

    def tensor(self) -> Tensor:
        """All grids as one tensor (N, h, w[, depth]), in the type of the shards."""
        return torch.from_numpy(np.concatenate(self.shards))

    def largest(self) -> int:
        """The largest index."""
        return max(int(shard.max()) for shard in self.shards)


# Writing.


def check_writable(folder: Path) -> None:
    """Refuse to write indices over something else.

    Raises:
        UserError: something other than an indices folder is there.
    """
    if folder.is_dir() and ((folder / META).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise UserError(
            f"{folder} exists and is not an indices folder; choose another --output_dir or empty it"
        )


@contextmanager
def new_folder(
    folder: Path, rows: Sequence[Row], meta: IndicesMeta, *, text: bool = False
) -> Iterator[Path]:
    """A temporary folder for the arrays, which replaces `folder` once the other files are added.

    After an error nothing is left of it. With `text`, indices.txt is written as well.
    """
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        columns = Row._fields if any(row.condition_path for row in rows) else Row._fields[:-1]
        write_table(staging / MANIFEST, columns, (row[: len(columns)] for row in rows))
        if text:
            with (staging / "indices.txt").open("w") as file:
                for path in sorted(staging.glob("indices*.npy")):
                    shard = np.load(path, mmap_mode="r", allow_pickle=False)
                    np.savetxt(file, shard.reshape(len(shard), -1), fmt="%d")
        (staging / META).write_text(json.dumps(asdict(meta), indent=2) + "\n")
        sums = {file.name: sha256(file) for file in staging.iterdir()}
        (staging / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def allocate(path: Path, shape: tuple[int, ...], codebook_size: int) -> np.ndarray:
    """An .npy file to fill in place: zeros of `shape`, of the smallest type for the codebook.

    Raises:
        OSError: the disk is full. The blocks are claimed here, because a memory map on a full
            disk ends the process by a signal.
    """
    grids = np.lib.format.open_memmap(path, "w+", smallest_type(codebook_size), shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return grids


def write_indices(
    folder: str | Path,
    indices: Tensor,
    rows: Sequence[Row],
    meta: IndicesMeta,
    *,
    text: bool = False,
    shard_bytes: int = SHARD_BYTES,
    add: Callable[[Path], object] | None = None,
) -> Path:
    """Write indices (N, h, w[, depth]), of any integer type, with N rows as an indices folder.

    Above `shard_bytes` the array is written in shards; `add` is called with the temporary folder,
    to write more files into it.

    Raises:
        UserError: something other than an indices folder is there.
        ValueError: an index is not below the codebook size, or the number of rows differs.
    """
    folder = Path(folder)
    check_writable(folder)
    if len(rows) != len(indices):
        raise ValueError(f"{len(rows)} rows for {len(indices)} grids")
    if indices.numel() and not 0 <= indices.min() <= indices.max() < meta.codebook_size:
        raise ValueError(
            f"indices from {indices.min()} to {indices.max()} for {meta.codebook_size} codes"
        )
    grids = indices.cpu().numpy().astype(smallest_type(meta.codebook_size))
    per_shard = max(1, shard_bytes // max(1, grids[:1].nbytes))
    with new_folder(folder, rows, meta, text=text) as staging:
        if len(grids) <= per_shard:
            np.save(staging / "indices.npy", grids)
        else:
            for number, start in enumerate(range(0, len(grids), per_shard)):
                np.save(staging / f"indices-{number:05}.npy", grids[start : start + per_shard])
        if add is not None:
            add(staging)
    return folder


def smallest_type(codebook_size: int) -> np.dtype:
    """The smallest unsigned type that holds every index of a codebook."""
    return np.min_scalar_type(codebook_size - 1)


# Reading.


def read_indices(
    path: str | Path,
    *,
    latent_dim: tuple[int, int] | None = None,
    codebook_size: int | None = None,
    depth: int | None = 1,
) -> Indices:
    """Read an indices folder, or a plain text file of indices, one line for each grid.

    Args:
        path: the folder or the file.
        latent_dim: refuse a folder with another; a text file without it must hold squares.
        codebook_size: refuse a folder of another codebook, and larger indices in a text file.
        depth: refuse a folder of another depth; None: accept any.

    Raises:
        UserError: no such path, not indices, damaged, or refused.
    """
    path = intact_folder(Path(path))
    if path.is_file():
        return _read_text(path, latent_dim, codebook_size, depth or 1)
    if not path.is_dir():
        raise UserError(
            f"no indices at {path}; give a folder of quantize_dataset.py or "
            "transformer_generation.py, or a text file of indices"
        )
    indices = _read_folder(path)
    if latent_dim not in (None, indices.latent_dim):
        raise UserError(
            f"--latent_dim {_shown(latent_dim)} does not fit {path}, whose grids are "
            f"{_shown(indices.latent_dim)}; omit the flag"
        )
    if codebook_size not in (None, indices.meta.codebook_size):
        raise UserError(
            f"{path} was made with a codebook of {indices.meta.codebook_size} codes, but the "
            f"model has {codebook_size}; use indices and models of one tokenizer"
        )
    if depth not in (None, indices.meta.depth):
        raise UserError(
            f"{path} has depth {indices.meta.depth}, but depth {depth} is needed here; use indices "
            "and models of one tokenizer, of a depth that this script supports"
        )
    return indices


def _read_folder(folder: Path) -> Indices:
    if not (folder / META).is_file():
        raise UserError(f"{folder} is not an indices folder: it has no {META}")
    check_links(folder)
    files = sorted(folder.glob("indices*.npy"))
    if not files:
        raise UserError(f"{folder} has no indices.npy; make it again")
    meta = _read_meta(folder)
    shards = [open_grids(file, (None, *meta.shape), meta.codebook_size) for file in files]
    indices = Indices(shards, _read_manifest(folder / MANIFEST), meta)
    if len(indices.rows) != len(indices):
        raise UserError(
            f"{folder}: {MANIFEST} has {len(indices.rows)} rows for {len(indices)} grids; make it "
            "again"
        )
    return indices


def _read_meta(folder: Path) -> IndicesMeta:
    verify(folder / META)
    values = read_json(folder / META)
    try:
        return typed(IndicesMeta, values)
    except UserError as error:
        raise UserError(f"{folder / META} is damaged: {error}; make it again") from error


def _read_manifest(path: Path) -> list[Row]:
    verify(path)
    try:
        table = read_table(path)
    except OSError as error:
        raise UserError(f"{path} is damaged: {error}; make it again") from error
    if tuple(table.columns) not in (Row._fields, Row._fields[:-1]):
        raise UserError(f"{path} is damaged: its columns are {','.join(table.columns)!r:.200}")
    if not table["split"].isin(("", *SPLITS)).all():
        raise UserError(f"{path} is damaged: a split is neither of {', '.join(SPLITS)}")
    return to_rows(table)


def open_grids(path: Path, shape: tuple[int | None, ...], codebook_size: int) -> np.ndarray:
    """The grids of an .npy file by memory map; None in the shape stands for any number from 1.

    Raises:
        UserError: the file is missing or damaged, or does not fit the shape or the codebook.
    """
    verify(path)
    try:
        grids = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises nearly every type on a damaged header
        raise UserError(f"{path} is damaged: {one_line(error)}; make it again") from error
    dtype = smallest_type(codebook_size)
    fits = grids.dtype == dtype and len(grids.shape) == len(shape) and grids.size > 0
    if not fits or any(n not in (None, m) for n, m in zip(shape, grids.shape, strict=True)):
        expected = ", ".join("N" if n is None else str(n) for n in shape)
        raise UserError(
            f"{path} holds {grids.dtype} {grids.shape}, but {META} says {dtype} ({expected}) for "
            f"{codebook_size} codes; make it again"
        )
    if grids.max() >= codebook_size:
        raise UserError(
            f"{path} holds the index {grids.max()}, but its codebook has only {codebook_size} "
            "codes; make it again"
        )
    return grids


def digest(path: Path) -> str:
    """The SHA-256 of the index files of a folder, or of a text file."""
    path = intact_folder(path)
    files = sorted(path.glob("indices*.npy")) if path.is_dir() else [path]
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def lineage_of(path: Path) -> Lineage:
    """The commands that led to an indices folder; () for a text file."""
    path = intact_folder(path)
    return finished(_read_meta(path).lineage, digest(path)) if path.is_dir() else ()


# Text files.


def _read_text(
    path: Path, latent_dim: tuple[int, int] | None, codebook_size: int | None, depth: int
) -> Indices:
    lines = _read_lines(path, codebook_size or LARGEST_CODEBOOK)
    length = lines.shape[1]
    if latent_dim is None:
        side = math.isqrt(length // depth)
        if side * side * depth != length:
            raise UserError(
                f"{path} line 1, number {length}: lines of {length} indices are not a square grid; "
                "give the grid by --latent_dim H,W"
            )
        latent_dim = side, side
    shape = _shape(latent_dim, depth)
    if math.prod(shape) != length:
        raise UserError(
            f"{path} line 1, number {min(length, math.prod(shape)) + 1}: it has {length} indices, "
            f"but a grid of {_shown(shape)} takes {math.prod(shape)}"
        )
    dtype = smallest_type(max(codebook_size or 0, int(lines.max()) + 1, 2))
    rows = [Row(f"line {number + 1}", "", "") for number in range(len(lines))]
    return Indices([lines.astype(dtype).reshape(-1, *shape)], rows, None)


def _read_lines(path: Path, limit: int) -> np.ndarray:
    """(N, indices per line), uint32, all below `limit`; empty lines do not count.

    Raises:
        UserError: anything but indices, lines of different lengths, or an empty file.
    """
    check_size(path, TABLE_BYTES)
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy's, of an empty file
            lines = np.loadtxt(path, np.uint32, comments=None, ndmin=2, encoding="utf-8-sig")
    except ValueError as error:
        pattern = r"could not convert string (.*) to uint32 at row (\d+), column (\d+)"
        if not (found := re.match(pattern, str(error))):
            problem = one_line(error).partition("; use `usecols`")[0]  # numpy's advice
            raise UserError(f"{path} is not a text file of indices: {problem}") from error
        raise UserError(
            f"{path} line {int(found[2]) + 1}, number {found[3]}: {found[1][:20]} is not an index; "
            "write integers of 0 or more, separated by spaces"
        ) from error
    if lines.size == 0:
        raise UserError(f"{path} holds no index; write a line of them for each image")
    if len(large := np.argwhere(lines >= limit)):
        line, column = large[0]
        raise UserError(
            f"{path} line {line + 1}, number {column + 1}: index {lines[line, column]} is out of "
            f"range, the codebook has {limit} codes"
        )
    return lines


def _shape(latent_dim: tuple[int, int], depth: int) -> tuple[int, ...]:
    return latent_dim if depth == 1 else (*latent_dim, depth)


def _shown(grid: tuple[int, ...]) -> str:
    return ",".join(map(str, grid))
