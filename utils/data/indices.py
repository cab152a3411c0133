"""The indices folder: grids of codebook indices, written completely or not at all, and checked.

    indices.npy    (N, h, w[, depth]) in the smallest unsigned type
    condition.npy  (N, hc, wc), optional: the grid of an image that comes with each image, such as
                   its segmentation or a low resolution (arXiv 2012.09841, section 4.1)
    crops.npy      (N, crops, h, w[, depth]), optional: grids of random crops and mirror images
    manifest.csv   image_path, label, split[, condition_path][, caption] of each grid
    meta.json      `IndicesMeta`
    sha256.json    the SHA-256 of each file
    indices.txt    on request: a line of space-separated indices for each grid

Arrays are read by memory map. Large ones are in several files: indices-00000.npy, ...
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import files
from utils.cli import UserError, user_error
from utils.data.sources import Row, ShardedArray, column_of
from utils.data.vocabulary import LARGEST_CODEBOOK, GridMeta
from utils.provenance import Lineage, finished

META, MANIFEST = "meta.json", "manifest.csv"
SHARD_BYTES = 1 << 26  # of one .npy file of indices


@dataclass(frozen=True)
class IndicesMeta(GridMeta):
    """meta.json: what the indices belong to."""

    gpt_run_id: str = ""  # the MLflow run of the GPT that sampled them, if one did
    lineage: Lineage = ()  # the commands up to the one that made them
    condition: GridMeta | None = None  # of the grids in condition.npy, None without them


class Indices(NamedTuple):
    """Grids (N, h, w[, depth]) of the smallest unsigned type, and the row of each."""

    grids: Tensor | ShardedArray
    rows: Sequence[Row]
    meta: IndicesMeta  # that of a text file names no tokenizer


# Writing.


@contextmanager
def new_folder(
    folder: Path,
    rows: Sequence[Row],
    meta: IndicesMeta,
    *,
    text: bool = False,
    staging: Path | None = None,
) -> Iterator[Path]:
    """A temporary folder for the arrays, which replaces `folder` once the other files are added.

    After an error nothing is left of it; `staging`, of `files.resume_staging`, stays as it is. With
    `text`, indices.txt is written as well.
    """
    from utils.data.sources.csv import write_table

    with files.new_folder(folder, staging) as staging:
        yield staging
        used = [name for name in Row._fields[3:] if any(column_of(rows, name))]
        columns = {name: column_of(rows, name) for name in (*Row._fields[:3], *used)}
        write_table(staging / MANIFEST, [*columns], zip(*columns.values(), strict=True))
        if text:
            with (staging / "indices.txt").open("w") as file:
                for path in shards_of(staging, "indices"):
                    shard = np.load(path, mmap_mode="r", allow_pickle=False)
                    np.savetxt(file, shard.reshape(len(shard), -1), fmt="%d")
        (staging / META).write_text(json.dumps(asdict(meta), indent=2) + "\n")


def allocate(path: Path, shape: tuple[int, ...], codebook_size: int) -> np.ndarray:
    """An .npy file to fill in place: zeros of `shape`, of the smallest type for the codebook.

    Its blocks are claimed at once, because a memory map on a full disk ends the process.
    """
    grids = np.lib.format.open_memmap(path, "w+", smallest_type(codebook_size), shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return grids


def write_indices(
    folder: str | Path, indices: Tensor, rows: Sequence[Row], meta: IndicesMeta
) -> Path:
    """Write indices (N, h, w[, depth]), of any integer type, with N rows as an indices folder.

    A UserError if something else is there.
    """
    folder = Path(folder)
    files.check_unused(folder, META)
    if indices.numel() and not 0 <= indices.min() <= indices.max() < meta.codebook_size:
        raise ValueError(
            f"indices from {indices.min()} to {indices.max()} for {meta.codebook_size} codes"
        )
    with new_folder(folder, rows, meta) as staging:
        save_grids(shard_path(staging, "indices", 0, 1), indices, meta.codebook_size)
    return folder


def save_grids(path: Path, grids: Tensor, codebook_size: int) -> None:
    """Write grids of any integer type as an .npy file of the smallest type for the codebook."""
    np.save(path, grids.cpu().numpy().astype(smallest_type(codebook_size)))


def shard_rows(count: int, meta: IndicesMeta, per_shard: int) -> list[Tensor]:
    """The rows of equal shards of `count` grids: `per_shard`, or 0: as fill `SHARD_BYTES`, each."""
    size = math.prod(meta.shape) * smallest_type(meta.codebook_size).itemsize
    shards = -(-count // (per_shard or max(1, SHARD_BYTES // size)))
    return [*torch.arange(count).tensor_split(max(1, shards))]


def shard_path(folder: Path, array: str, number: int, count: int) -> Path:
    """The file of one of `count` shards of an array: indices.npy, or indices-00000.npy."""
    return folder / (f"{array}.npy" if count == 1 else f"{array}-{number:05}.npy")


def shards_of(folder: Path, array: str) -> list[Path]:
    """The files of an array in an indices folder, in order."""
    return sorted(folder.glob(f"{array}*.npy"), key=lambda path: (len(path.name), path.name))


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

    A text file without `latent_dim` must hold squares. A UserError if there are no indices at the
    path, damaged ones, or others than the last three arguments say (depth None: any).
    """
    from utils.data.sources.csv import read_table

    path = files.intact_folder(Path(path))
    if path.is_file():
        return _read_text(path, latent_dim, codebook_size or LARGEST_CODEBOOK, depth or 1)
    if not path.is_dir():
        raise UserError(
            f"no indices at {path}; give a folder of quantize_dataset.py or "
            "transformer_generation.py, or a text file of indices"
        )
    meta = _read_meta(path)
    wanted_values = {"latent_dim": latent_dim, "codebook_size": codebook_size, "depth": depth}
    for name, wanted in wanted_values.items():
        if wanted not in (None, getattr(meta, name)):
            raise UserError(
                f"{path} has {name} {getattr(meta, name)}, but here it must be {wanted}; use "
                "indices and models of one tokenizer, and no --latent_dim with an indices folder"
            )
    files.check_links(path)
    files.verify(path / MANIFEST)
    rows = read_table(path / MANIFEST)[1]
    return Indices(open_grids(path, "indices", meta, len(rows)), rows, meta)


def _read_meta(folder: Path) -> IndicesMeta:
    if not (folder / META).is_file():
        raise UserError(f"{folder} is not an indices folder: it has no {META}")
    files.verify(folder / META)
    values = files.read_json(folder / META)
    with user_error(f"{folder / META} is damaged: %s; make it again", UserError):
        return files.typed(IndicesMeta, values)


def open_array(path: Path, shape: tuple, dtypes: Any, demand: str = "it must be") -> np.ndarray:
    """An .npy file by memory map, never of pickled objects; names in the shape are any sizes.

    Or the vectors of a table. (N, D) is (N, 1, D) for a shape of three. A UserError for a missing
    or damaged file, another shape or type, which cites the `demand`.
    """
    from utils.data.sources import tables  # only where arrays are read

    files.verify(path)
    # numpy raises nearly every type on a damaged header
    with user_error(f"{path} is damaged: %s; make it again", Exception):
        is_table = tables.accepts(path)
        array = tables.read_vectors(path) if is_table else np.lib.format.open_memmap(path, mode="r")
        is_flat = array.ndim == 2 and len(shape) == 3 and array.dtype.kind == "f"
        array = array[:, None] if is_flat else array
    fits = array.dtype in dtypes and array.ndim == len(shape) and array.size > 0
    if not fits or any(n not in (m, str(n)) for n, m in zip(shape, array.shape, strict=True)):
        wanted = f"{' or '.join(map(str, dtypes))} ({', '.join(map(str, shape))})"
        found = f"{array.dtype} {array.shape}"
        raise UserError(f"{path} holds {found}, but {demand} {wanted}; make it again")
    return array


def open_grids(
    folder: Path, array: str, meta: GridMeta, count: int, *axes: str
) -> Tensor | ShardedArray:
    """An array (count, *axes, h, w[, depth]) of an indices folder, as its meta.json describes it.

    The axes have any sizes. A UserError for missing or damaged files, and for another count.
    """
    paths, found, kinds = shards_of(folder, array), 0, [smallest_type(meta.codebook_size)]
    for path in paths:  # one at a time is in memory
        one = open_array(path, ("N", *axes, *meta.shape), kinds, f"{META} says")
        if (largest := one.max()) >= meta.codebook_size:
            raise UserError(
                f"{path} holds the index {largest}, but its codebook has only "
                f"{meta.codebook_size} codes; make it again"
            )
        found += len(one)
    if not found or found != count:
        raise UserError(
            f"{folder / MANIFEST} has {count} rows for {found} grids in {array}.npy; make the "
            "folder again"
        )
    with warnings.catch_warnings(action="ignore"):  # that it must not be written to
        return torch.from_numpy(one) if len(paths) == 1 else ShardedArray(paths)


def digest(path: Path) -> str:
    """The SHA-256 of the index files of a folder, or of a text file."""
    path = files.intact_folder(path)
    shards = shards_of(path, "indices") if path.is_dir() else [path]
    if len(shards) == 1:
        return files.sha256(shards[0])
    sums = (files.recorded_sha256(shard) or files.sha256(shard) for shard in shards)
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def lineage_of(path: Path) -> Lineage:
    """The commands that led to an indices folder; () for a text file."""
    path = files.intact_folder(path)
    return finished(_read_meta(path).lineage, digest(path)) if path.is_dir() else ()


def _read_text(path: Path, latent_dim: tuple[int, int] | None, limit: int, depth: int) -> Indices:
    """The grids of a text file, whose indices must be below `limit`."""
    files.check_size(path, files.TABLE_BYTES)
    with user_error(f"{path} is not a text file of indices: %s", UnicodeError):
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    side = max(1, math.isqrt(len(lines[0].split()) // depth))
    meta = IndicesMeta(limit, latent_dim or (side, side), depth=depth)
    grids = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        for place, word in enumerate(words, 1):
            if not (word.isdecimal() and word.isascii() and len(word) < 20 and int(word) < limit):
                raise UserError(
                    f"{path} line {number}, number {place}: {word:.20} is not an index of the "
                    f"codebook; write integers from 0 to {limit - 1}, separated by spaces"
                )
        if len(words) != math.prod(meta.shape):
            raise UserError(
                f"{path} line {number}: it has {len(words)} indices, but a grid of "
                f"{','.join(map(str, meta.shape))} takes {math.prod(meta.shape)}; write a line "
                "for each image, or give the grid by --latent_dim H,W"
            )
        grids.append(np.fromiter(map(int, words), np.uint32))
    values = np.stack(grids)
    if limit == LARGEST_CODEBOOK:  # not known: as large as it needs to be
        meta = replace(meta, codebook_size=max(2, int(values.max()) + 1))
    values = values.astype(smallest_type(meta.codebook_size)).reshape(-1, *meta.shape)
    rows = [Row(f"line {number}", "", "") for number in range(1, len(grids) + 1)]
    return Indices(torch.from_numpy(values), rows, meta)
