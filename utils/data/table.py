"""The CSV of a data set: its rows, and which of them train."""

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.cli import UserError, first_few
from utils.files import TABLE_BYTES, check_size

SPLITS = ("train", "val")
PATHS = ("image_path", "condition_path")  # columns of files


class Row(NamedTuple):
    """One line of the CSV; all but image_path are "" where the CSV has no such column."""

    image_path: str  # as written, relative to the CSV
    label: str
    split: str
    condition_path: str = ""  # like image_path


def read_csv(path: str | Path, *, allow_outside_paths: bool = False) -> list[Row]:
    """Read and check a CSV of images.

    All values are text: the label `0001` stays `0001`, and `NA` stays `NA`.

    Raises:
        UserError: no such file, no column image_path, no rows, a line with too many or too few
            fields, an unknown split, files that are missing, outside the CSV's folder or, by
            another name, on the other side of the split.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such CSV file: {path}; --path_to_data takes a CSV of image paths")
    check_size(path, TABLE_BYTES)
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            if "image_path" not in header:
                raise UserError(
                    f"{path} has no column image_path; its first line is {','.join(header)!r:.200}"
                )
            if len(set(header)) != len(header):
                raise UserError(f"{path} names a column twice: {','.join(header)!r:.200}")
            for fields in lines:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{path} line {lines.line_num}: {len(fields)} fields, but the first line "
                        f"names {len(header)} columns; quote values that contain a comma"
                    )
                values = dict(zip(header, fields, strict=True))
                row = Row(**{name: values.get(name, "") for name in Row._fields})
                for name in PATHS:
                    if name in header and not values[name]:
                        raise UserError(f"{path} line {lines.line_num}: {name} is empty")
                    if "\0" in getattr(row, name):
                        raise UserError(f"{path} line {lines.line_num}: {name} has a zero byte")
                if "split" in header and row.split not in SPLITS:
                    raise UserError(
                        f"{path} line {lines.line_num}: split is {row.split!r}; use train or val"
                    )
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{path} lists no images; add a line for each below the header")
    for name in PATHS:
        files = [getattr(row, name) for row in rows if getattr(row, name)]
        _check_files(path, files, allow_outside_paths)
    _check_splits(path, rows)
    return rows


def _check_files(path: Path, files: list[str], allow_outside_paths: bool) -> None:
    folder = os.path.realpath(path.parent)
    missing, outside = [], []
    for name, file in zip(files, real_paths(path.parent, files), strict=True):
        if not os.path.isfile(file):
            missing.append(name)
        elif not allow_outside_paths and not file.startswith(folder + os.sep):
            outside.append(name)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} files in {path} do not exist: {first_few(missing)}; "
            "paths are relative to the folder of the CSV"
        )
    if outside:
        raise UserError(
            f"{len(outside)} of {len(files)} files in {path} are outside its folder: "
            f"{first_few(outside)}; --allow_outside_paths accepts them"
        )


def _check_splits(path: Path, rows: list[Row]) -> None:
    """Refuse a file that is on both sides of the split, be it by two names."""
    first: dict[str, Row] = {}
    files = real_paths(path.parent, [row.image_path for row in rows])
    for row, file in zip(rows, files, strict=True):
        other = first.setdefault(file, row)
        if other.split != row.split:
            raise UserError(
                f"{path}: {other.image_path} ({other.split}) and {row.image_path} ({row.split}) "
                "are one file; put it on one side of the split"
            )


def real_paths(folder: str | Path, names: Sequence[str]) -> Iterator[str]:
    """The path of each file without symbolic links: one for all names of a file."""
    folders: dict[str, str] = {}  # whose links are followed once, not for each file
    for path in names:
        head, name = os.path.split(os.path.join(folder, path))
        if head not in folders:
            folders[head] = os.path.realpath(head)
        file = os.path.join(folders[head], name)
        plain = name not in ("", os.curdir, os.pardir) and not os.path.islink(file)
        yield file if plain else os.path.realpath(file)


def split_rows(
    rows: Sequence[Row], *, val_fraction: float, seed: int, folder: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers of the training rows and of the validation rows.

    The split column decides where there is one. Otherwise `val_fraction` of the files are drawn,
    by a hash of seed and path, so that all rows of one file are on the same side.

    Args:
        rows: of a CSV.
        val_fraction: share of the files.
        seed: of the draw.
        folder: of the CSV, to know a file by all its names where there are symbolic links.

    Returns:
        two int64 tensors in ascending order; the second may be empty.
    """
    if rows[0].split:
        validation = {number for number, row in enumerate(rows) if row.split == "val"}
    else:
        names = [os.path.normpath(row.image_path) for row in rows]
        if folder is not None:
            first: dict[str, str] = {}  # name of each file in the CSV
            files = real_paths(folder, [row.image_path for row in rows])
            names = [first.setdefault(file, name) for file, name in zip(files, names, strict=True)]
        shuffled = sorted(
            set(names), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()
        )
        chosen = set(shuffled[: round(val_fraction * len(shuffled))])
        validation = {number for number, name in enumerate(names) if name in chosen}
    train = [number for number in range(len(rows)) if number not in validation]
    return torch.tensor(train, dtype=torch.long), torch.tensor(sorted(validation), dtype=torch.long)


def epoch_order(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """`rows` in the order of one epoch, a function of seed and epoch alone."""
    return rows[torch.randperm(len(rows), generator=seeded("order", seed, epoch))]


def seeded(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """A generator of random numbers for one purpose in one epoch."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
