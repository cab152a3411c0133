"""The indices folder: grids of codebook indices on disk, written and read."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.grid_meta import MOST_CODES, GridMeta
from utils.data.index_folder import META, new_folder, open_array, smallest_type
from utils.data.index_text import read_lines
from utils.data.manifest import MANIFEST, read_manifest
from utils.data.table import Row
from utils.files import check_links, intact_folder, read_json, sha256, typed, verify
from utils.provenance import Lineage, finished

SHARD_BYTES = 1 << 30  # of one .npy file


@dataclass(frozen=True)
class IndicesMeta(GridMeta):
    """meta.json: what the indices belong to.

    Attributes:
        depth: indices a cell.
        gpt_run_id: the MLflow run of the GPT that drew them, if one did.
        lineage: the commands up to the one that made them.
        condition: what the grids in condition.npy belong to, if there are any.
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
    """Grids of codebook indices and what each of them is.

    Attributes:
        shards: arrays (n, h, w), or (n, h, w, depth) for a depth above 1, of the smallest
            unsigned type, memory-mapped where read.
        rows: one for each grid, in order.
        meta: what they belong to; None for a plain text file, which does not say.
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
        """Indices a cell."""
        return self.meta.depth if self.meta is not None else 1

    def tensor(self) -> Tensor:
        """All grids as one tensor (N, h, w[, depth]), in the type of the shards."""
        return torch.from_numpy(np.concatenate(self.shards))

    def largest(self) -> int:
        """The largest index."""
        return max(int(shard.max()) for shard in self.shards)


def check_writable(folder: Path) -> None:
    """Refuse to write indices over something else.

    Raises:
        UserError: something else than an indices folder is there.
    """
    if folder.is_dir() and ((folder / META).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise UserError(
            f"{folder} exists and is no indices folder; choose another --output_dir or empty it"
        )


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
    """Write an indices folder: indices.npy (or shards of it), manifest.csv, meta.json, sha256.json.

    The folder appears whole or not at all, and takes the place of an indices folder before it.

    Args:
        folder: where to.
        indices: (N, h, w), or (N, h, w, depth) for a depth above 1, of any integer type.
        rows: N rows.
        meta: see `IndicesMeta`.
        text: also write indices.txt, a line of space-separated indices for each grid.
        shard_bytes: above this size the array is written in shards, indices-00000.npy and so on.
        add: called with the folder while it is made, to put more files into it.

    Raises:
        UserError: something else than an indices folder is there.
        ValueError: an index is not below the codebook size, or the rows are not as many.
    """
    folder = Path(folder)
    check_writable(folder)
    if len(rows) != len(indices):
        raise ValueError(f"{len(rows)} rows for {len(indices)} grids")
    if indices.numel() and not 0 <= indices.min() <= indices.max() < meta.codebook_size:
        raise ValueError(
            f"indices from {indices.min()} to {indices.max()} for {meta.codebook_size} codes"
        )
    array = indices.cpu().numpy().astype(smallest_type(meta.codebook_size))
    per_shard = max(1, shard_bytes // max(1, array[:1].nbytes))
    with new_folder(folder, rows, meta, text=text) as staging:
        if len(array) <= per_shard:
            np.save(staging / "indices.npy", array)
        else:
            for number, start in enumerate(range(0, len(array), per_shard)):
                np.save(staging / f"indices-{number:05}.npy", array[start : start + per_shard])
        if add is not None:
            add(staging)
    return folder


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
        latent_dim: the grid; a folder says it itself, and is refused where it differs. A text
            file without it must hold squares.
        codebook_size: refuse indices from there on; None: what meta.json says.
        depth: indices a cell; a folder of another depth is refused. None: what a folder says.

    Raises:
        UserError: no such path, something else than indices, or indices that do not fit.
    """
    path = intact_folder(Path(path))
    if path.is_dir():
        indices = _read_folder(path)
        if latent_dim is not None and latent_dim != indices.latent_dim:
            raise UserError(
                f"--latent_dim {_shown(latent_dim)} does not fit {path}, whose grids are "
                f"{_shown(indices.latent_dim)}; omit the flag"
            )
        if codebook_size is not None and indices.meta.codebook_size != codebook_size:
            raise UserError(
                f"{path} was made with a codebook of {indices.meta.codebook_size} codes, but the "
                f"model has {codebook_size}; use indices and models of one tokenizer"
            )
        if depth not in (None, indices.meta.depth):
            raise UserError(
                f"{path} has {indices.meta.depth} indices a cell, but {depth} is needed here; use "
                "indices and models of one tokenizer, of a depth that this script takes"
            )
        return indices
    if path.is_file():
        return _read_text(path, latent_dim, codebook_size, depth or 1)
    raise UserError(
        f"no indices at {path}; give a folder of quantize_dataset.py or transformer_generation.py, "
        "or a text file of indices"
    )


def _read_folder(folder: Path) -> Indices:
    if not (folder / META).is_file():
        raise UserError(f"{folder} is no indices folder: it has no {META}")
    check_links(folder)
    files = sorted(folder.glob("indices*.npy"))
    if not files:
        raise UserError(f"{folder} has no indices.npy; make it again")
    for file in (folder / META, folder / MANIFEST):
        verify(file)
    meta = _read_meta(folder)
    shards = [_read_shard(file, meta) for file in files]
    rows = read_manifest(folder / MANIFEST)
    indices = Indices(shards, rows, meta)
    if len(rows) != len(indices):
        raise UserError(
            f"{folder}: {MANIFEST} has {len(rows)} rows for {len(indices)} grids; make it again"
        )
    if indices.largest() >= meta.codebook_size:
        raise UserError(
            f"{folder} holds the index {indices.largest()}, but its codebook has only "
            f"{meta.codebook_size} codes; make it again"
        )
    return indices


def _read_meta(folder: Path) -> IndicesMeta:
    values = read_json(folder / META)
    try:
        return typed(IndicesMeta, values)
    except UserError as error:
        raise UserError(f"{folder / META} is damaged: {error}; make it again") from error


def digest(path: Path) -> str:
    """The SHA-256 of the index files of a folder, or of a text file."""
    path = intact_folder(path)
    files = sorted(path.glob("indices*.npy")) if path.is_dir() else [path]
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def lineage_of(path: Path) -> Lineage:
    """The commands that led to an indices folder; () for a text file, which does not say."""
    path = intact_folder(path)
    return finished(_read_meta(path).lineage, digest(path)) if path.is_dir() else ()


def _read_shard(file: Path, meta: IndicesMeta) -> np.ndarray:
    shard = open_array(file)
    dtype = smallest_type(meta.codebook_size)
    if shard.shape[1:] != meta.shape or shard.dtype != dtype or len(shard) == 0:
        raise UserError(
            f"{file} holds {shard.dtype} {shard.shape}, but {META} says grids of "
            f"{_shown(meta.shape)} and {meta.codebook_size} codes, {dtype}; make it again"
        )
    return shard


def _read_text(
    path: Path, latent_dim: tuple[int, int] | None, codebook_size: int | None, depth: int
) -> Indices:
    array = read_lines(path, codebook_size or MOST_CODES)
    length = array.shape[1]
    if latent_dim is None:
        side = math.isqrt(length // depth)
        if side * side * depth != length:
            raise UserError(
                f"{path} line 1, number {length}: lines of {length} indices make no square; say "
                "the grid by --latent_dim H,W"
            )
        latent_dim = side, side
    shape = _shape(latent_dim, depth)
    if math.prod(shape) != length:
        raise UserError(
            f"{path} line 1, number {min(length, math.prod(shape)) + 1}: it has {length} indices, "
            f"but a grid of {_shown(shape)} takes {math.prod(shape)}"
        )
    dtype = smallest_type(max(codebook_size or 0, int(array.max()) + 1, 2))
    rows = [Row(f"line {number + 1}", "", "") for number in range(len(array))]
    return Indices([array.astype(dtype).reshape(-1, *shape)], rows, None)


def _shape(latent_dim: tuple[int, int], depth: int) -> tuple[int, ...]:
    return latent_dim if depth == 1 else (*latent_dim, depth)


def _shown(grid: tuple[int, ...]) -> str:
    return ",".join(map(str, grid))
