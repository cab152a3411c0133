"""The indices folder: grids of codebook indices on disk, written and read."""

import csv
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.checkpoint import LoadedModel, read_json, sha256, swap_in, whole
from utils.cli import UserError, build
from utils.index_text import read_lines
from utils.provenance import Lineage, finished, parse
from utils.table import Row

META, MANIFEST = "meta.json", "manifest.csv"
SHARD_BYTES = 1 << 30  # of one .npy file


@dataclass(frozen=True)
class IndicesMeta:
    """meta.json: what the indices belong to.

    Attributes:
        codebook_size: K; every index is below it.
        latent_dim: rows and columns (h, w) of a grid.
        depth: indices a cell.
        tokenizer_sha256: of the model.safetensors that made the indices or decodes them.
        tokenizer_run_id, gpt_run_id: MLflow runs of the models, where there are any.
        lineage: the commands up to the one that made them.
    """

    codebook_size: int
    latent_dim: tuple[int, int]
    depth: int = 1
    tokenizer_sha256: str = ""
    tokenizer_run_id: str = ""
    gpt_run_id: str = ""
    lineage: Lineage = ()

    def __post_init__(self) -> None:
        if not isinstance(self.codebook_size, int) or self.codebook_size < 2:
            raise ValueError(f"codebook_size must be 2 or more, got {self.codebook_size}")
        grid = tuple(self.latent_dim)
        if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
            raise ValueError(f"latent_dim must be rows and columns, got {self.latent_dim}")
        if not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(f"depth must be 1 or more, got {self.depth}")
        object.__setattr__(self, "latent_dim", grid)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one grid's indices: (h, w), or (h, w, depth) for a depth above 1."""
        return _shape(self.latent_dim, self.depth)

    def check_tokenizer(self, tokenizer: LoadedModel, path: Path) -> None:
        """Refuse a tokenizer that is not the one that the indices at `path` belong to.

        Raises:
            UserError: it is another one.
        """
        if self.tokenizer_sha256 not in ("", tokenizer.sha256):
            raise UserError(
                f"{path} belongs to the tokenizer {self.tokenizer_sha256[:12]} (run "
                f"{self.tokenizer_run_id or 'unknown'}), but {tokenizer.folder} is "
                f"{tokenizer.sha256[:12]}; use indices and models of one tokenizer"
            )


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

    def tensor(self) -> Tensor:
        """All grids as one tensor (N, h, w[, depth]), in the type of the shards."""
        return torch.from_numpy(np.concatenate(self.shards))

    def largest(self) -> int:
        """The largest index."""
        return max(int(shard.max()) for shard in self.shards)


def smallest_type(codebook_size: int) -> np.dtype:
    """The smallest unsigned type that holds every index of a codebook."""
    return np.min_scalar_type(codebook_size - 1)


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
) -> Path:
    """Write an indices folder: indices.npy (or shards of it), manifest.csv and meta.json.

    The folder appears whole or not at all, and takes the place of an indices folder before it.

    Args:
        folder: where to.
        indices: (N, h, w), or (N, h, w, depth) for a depth above 1, of any integer type.
        rows: N rows.
        meta: see `IndicesMeta`.
        text: also write indices.txt, a line of space-separated indices for each grid.
        shard_bytes: above this size the array is written in shards, indices-00000.npy and so on.

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
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    array = indices.cpu().numpy().astype(smallest_type(meta.codebook_size))
    per_shard = max(1, shard_bytes // max(1, array[:1].nbytes))
    if len(array) <= per_shard:
        np.save(staging / "indices.npy", array)
    else:
        for number, start in enumerate(range(0, len(array), per_shard)):
            np.save(staging / f"indices-{number:05}.npy", array[start : start + per_shard])
    with (staging / MANIFEST).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    if text:
        np.savetxt(staging / "indices.txt", array.reshape(len(array), -1), fmt="%d")
    (staging / META).write_text(json.dumps(asdict(meta), indent=2) + "\n")
    swap_in(staging, folder)
    return folder


def read_indices(
    path: str | Path,
    *,
    latent_dim: tuple[int, int] | None = None,
    codebook_size: int | None = None,
    depth: int = 1,
) -> Indices:
    """Read an indices folder, or a plain text file of indices, one line for each grid.

    Args:
        path: the folder or the file.
        latent_dim: the grid; a folder says it itself, and is refused where it differs. A text
            file without it must hold squares.
        codebook_size: refuse indices from there on; None: what meta.json says.
        depth: indices a cell; a folder of another depth is refused.

    Raises:
        UserError: no such path, something else than indices, or indices that do not fit.
    """
    path = whole(Path(path))
    if path.is_dir():
        indices = _read_folder(path)
        if latent_dim is not None and latent_dim != indices.latent_dim:
            raise UserError(
                f"--latent_dim {_shown(latent_dim)} does not fit {path}, whose grids are "
                f"{_shown(indices.latent_dim)}; leave the flag away"
            )
        if codebook_size is not None and indices.meta.codebook_size != codebook_size:
            raise UserError(
                f"{path} was made with a codebook of {indices.meta.codebook_size} codes, but the "
                f"model has {codebook_size}; use indices and models of one tokenizer"
            )
        if indices.meta.depth != depth:
            raise UserError(
                f"{path} has {indices.meta.depth} indices a cell, but {depth} is needed here; use "
                "indices and models of one tokenizer, of a depth that this script takes"
            )
        return indices
    if path.is_file():
        return _read_text(path, latent_dim, codebook_size, depth)
    raise UserError(
        f"no indices at {path}; give a folder of quantize_dataset.py or transformer_generation.py, "
        "or a text file of indices"
    )


def _read_folder(folder: Path) -> Indices:
    if not (folder / META).is_file():
        raise UserError(f"{folder} is no indices folder: it has no {META}")
    try:
        meta = _read_meta(folder)
    except (TypeError, UserError) as error:
        raise UserError(f"{folder / META} is damaged: {error}; make it again") from error
    files = sorted(folder.glob("indices*.npy"))
    if not files:
        raise UserError(f"{folder} has no indices.npy; make it again")
    shards = []
    for file in files:
        try:
            shard = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # numpy raises nearly everything on a damaged header
            line = " ".join(str(error).split())[:200]
            raise UserError(f"{file} is damaged: {line}; make it again") from error
        if shard.shape[1:] != meta.shape or shard.dtype.kind != "u" or len(shard) == 0:
            raise UserError(
                f"{file} holds {shard.dtype} {shard.shape}, but {META} says grids of "
                f"{_shown(meta.shape)}; make it again"
            )
        shards.append(shard)
    rows = _read_manifest(folder / MANIFEST)
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
    values.pop("made_by", None)  # of folders from before there was a lineage
    return build(IndicesMeta, **values | {"lineage": build(parse, values.get("lineage", ()))})


def digest(path: Path) -> str:
    """The SHA-256 of the index files of a folder, or of a text file."""
    path = whole(path)
    files = sorted(path.glob("indices*.npy")) if path.is_dir() else [path]
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def lineage_of(path: Path) -> Lineage:
    """The commands that led to an indices folder; () for a text file, which does not say."""
    path = whole(path)
    return finished(_read_meta(path).lineage, digest(path)) if path.is_dir() else ()


def _read_manifest(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file, strict=True)
        if tuple(header) != Row._fields:
            raise ValueError(f"its first line is {','.join(header)!r}")
        return [Row(*fields) for fields in lines]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}; make it again") from error


def _read_text(
    path: Path, latent_dim: tuple[int, int] | None, codebook_size: int | None, depth: int
) -> Indices:
    array = read_lines(path, codebook_size or 1 << 32)
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
