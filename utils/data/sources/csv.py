"""A CSV as a data source: columns image_path[,label][,split][,condition_path][,caption].

The columns are in any order. Also as spreadsheets write it: separated by commas, semicolons or
tabs, in UTF-8 or UTF-16.
"""

import codecs
import csv
import io
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from sys import intern
from typing import Any

from utils.cli import UserError, first_few, one_line, user_error
from utils.data.sources import SPLITS, Row, Rows, check_rows, column_name, note
from utils.files import TABLE_BYTES, check_size
from utils.progress import ProgressBar

SEPARATORS = ",;\t"
WIDTH = len(Row._fields)


def accepts(path: Path) -> bool:
    return path.suffix == ".csv"


def read_rows(path: Path) -> Rows:
    """The rows of a CSV; a UserError for what `read_table` refuses, and for an empty value."""
    if not path.is_file():
        raise UserError(
            f"no such CSV file: {path}; --path_to_data takes a CSV of image paths, or a folder "
            "with a folder of images for each class"
        )
    header, rows = read_table(path)
    if others := [name or "(no name)" for name in header if name not in Row._fields]:
        note(f"{path}: ignored columns: {first_few(others)}; used: {', '.join(Row._fields)}")
    check_rows(path, header, rows)
    return rows


def read_table(path: Path) -> tuple[list[str], Rows]:
    """The header and the rows of a CSV. Values are text: 0001 stays 0001, and NA stays NA.

    A UserError for another file, no column image_path, a repeated column, an unknown split, or a
    row with too many or too few fields.
    """
    values: list[str] = []  # row by row
    reader = _open_table(path)
    try:
        header = [column_name(name) for name in next(reader, [])]
        known = [name for name in header if name in Row._fields]
        if "image_path" not in header:
            raise UserError(
                f"{path} has no column image_path; its first line is {','.join(header)!r:.200}"
            )
        if len(set(known)) != len(known):
            raise UserError(f"{path} repeats a column: {','.join(header)!r:.200}")
        # Of a missing column, the "" that is appended to each row.
        chosen = itemgetter(*(header.index(n) if n in header else -1 for n in Row._fields))
        for fields in reader:
            if not any(fields):  # an empty line, which spreadsheets fill with separators
                continue
            if len(fields) != len(header):
                raise csv.Error(f"{len(fields)} fields, but the first line has {len(header)}")
            fields.append("")
            path_of_image, label, split, condition_path, caption = chosen(fields)
            if split and split not in SPLITS:
                raise csv.Error(f"split is {split!r}; use train or val")
            # Of the same label or split, all rows have the same object.
            values += path_of_image, intern(label), intern(split), condition_path, caption
    except csv.Error as error:
        raise UserError(
            f"{path} row {len(values) // WIDTH + 1} (up to line {reader.line_num}): "
            f"{one_line(error)}; close each quote, and quote values that contain a separator"
        ) from error
    return header, Rows({name: values[n::WIDTH] for n, name in enumerate(Row._fields)})


def _open_table(path: Path) -> Any:
    """A csv.reader of a file, in its encoding and with its separator."""
    with user_error(f"cannot read {path}: %s", OSError):
        check_size(path, TABLE_BYTES)
        content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        content = content.decode("utf-16" if wide else "utf-8-sig").encode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not in UTF-8: {error.reason}; save it as CSV in UTF-8"
        ) from error
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8", newline="")
    first = lines.readline()
    separator = max(SEPARATORS, key=first.count)
    if first.lower().startswith("sep="):  # Excel's
        first = lines.readline()
    blocks = iter(partial(lines.readlines, 1 << 20), [])
    bar = ProgressBar(blocks, path.name, len(content) >> 20, unit=" MB", leave=False)
    text, spaces = chain([first], chain.from_iterable(bar)), f"{separator} " in first
    return csv.reader(text, delimiter=separator, skipinitialspace=spaces, strict=True)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV in UTF-8 that `read_table` reads back unchanged."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
