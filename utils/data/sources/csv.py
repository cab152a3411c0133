"""A CSV as a data source: columns image_path[,label][,split][,condition_path], in any order."""

import csv
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from utils.cli import UserError, one_line
from utils.data.sources import FILE_COLUMNS, SPLITS, Row
from utils.files import TABLE_BYTES, check_size


def accepts(path: Path) -> bool:
    return path.suffix == ".csv"


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; a UserError for what `read_table` refuses, and for an empty value."""
    if not path.is_file():
        raise UserError(f"no such CSV file: {path}; --path_to_data takes a CSV of image paths")
    header, rows = read_table(path)
    for name in {"split", *FILE_COLUMNS}.intersection(header):
        for number, value in enumerate(map(itemgetter(Row._fields.index(name)), rows), 1):
            if not value:
                raise UserError(f"{path} row {number}: {name} is empty; fill it in")
    return rows


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """The header and the rows of a CSV in UTF-8. Values are text: 0001 stays 0001, NA stays NA.

    A UserError for another file, no column image_path, a repeated column, an unknown split, or a
    row with too many or too few fields.
    """
    try:
        check_size(path, TABLE_BYTES)
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = tqdm(file, path.name, unit=" lines", disable=None, leave=False, delay=1)
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            table = [fields for fields in reader if fields]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(
            f"{path} is not a valid UTF-8 CSV: {one_line(error)}; quote values that contain a comma"
        ) from error
    if "image_path" not in header:
        raise UserError(
            f"{path} has no column image_path; its first line is {','.join(header)!r:.200}"
        )
    if len(set(header)) != len(header):
        raise UserError(f"{path} repeats a column: {','.join(header)!r:.200}")
    # Of a missing column, the "" that is appended to each row.
    chosen = itemgetter(*(header.index(n) if n in header else -1 for n in Row._fields))
    rows = []
    for number, fields in enumerate(table, 1):
        if len(fields) != len(header):
            raise UserError(
                f"{path} row {number}: {len(fields)} fields, but the first line has "
                f"{len(header)}; quote values that contain a comma"
            )
        rows.append(Row._make(chosen((*fields, ""))))
        if rows[-1].split not in ("", *SPLITS):
            raise UserError(f"{path} row {number}: split is {rows[-1].split!r}; use train or val")
    return header, rows


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV in UTF-8 that `read_table` reads back unchanged."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
