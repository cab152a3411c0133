"""manifest.csv of an indices folder: which image each grid is of."""

import csv
from collections.abc import Sequence
from pathlib import Path

from utils.cli import UserError
from utils.data.table import SPLITS, Row
from utils.files import TABLE_BYTES, check_size

MANIFEST = "manifest.csv"


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """Write image_path, label and split of each row, and condition_path where there is any."""
    names = Row._fields if any(row.condition_path for row in rows) else Row._fields[:-1]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(row[: len(names)] for row in rows)


def read_manifest(path: Path) -> list[Row]:
    """What `write_manifest` wrote.

    Raises:
        UserError: no such file, or something else.
    """
    try:
        check_size(path, TABLE_BYTES)
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file, strict=True)
        if tuple(header) not in (Row._fields, Row._fields[:-1]):
            raise ValueError(f"its first line is {','.join(header)!r:.200}")
        rows = [Row(**dict(zip(header, fields, strict=True))) for fields in lines]
        if not {row.split for row in rows} <= {"", *SPLITS}:
            raise ValueError(f"a split is none of {', '.join(SPLITS)}")
        return rows
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}; make it again") from error
