"""A CSV as a data source: columns image_path[,label][,split][,condition_path], in any order."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from utils.cli import UserError, one_line
from utils.data.sources import FILE_COLUMNS, SPLITS, Row
from utils.files import TABLE_BYTES, check_size


def accepts(path: Path) -> bool:
    return path.suffix == ".csv"


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV.

    Raises:
        UserError: no such file, no column image_path, a row with too many or too few fields, an
            empty path, or an unknown split.
    """
    if not path.is_file():
        raise UserError(f"no such CSV file: {path}; --path_to_data takes a CSV of image paths")
    table = read_table(path)
    if "image_path" not in table:
        raise UserError(
            f"{path} has no column image_path; its first line is {','.join(table.columns)!r:.200}"
        )
    for name in table.columns.intersection(FILE_COLUMNS):
        if (table[name] == "").any():
            raise UserError(f"{path} row {_first(table[name] == '')}: {name} is empty")
    if "split" in table and not table["split"].isin(SPLITS).all():
        row = _first(~table["split"].isin(SPLITS))
        raise UserError(
            f"{path} row {row}: split is {table['split'].iloc[row - 1]!r}; use train or val"
        )
    return to_rows(table)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV in UTF-8 with a header. All values are text: 0001 stays 0001, and NA stays NA.

    Raises:
        UserError: not such a file, a row with too many or too few fields, or a repeated column.
    """
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    options |= {"header": None, "index_col": False}
    options["engine"] = "python"  # which fills missing fields with NaN, and so tells them from ""
    check_size(path, TABLE_BYTES)
    try:
        width = pd.read_csv(path, nrows=1, **options).shape[1]
        # One column too many: pandas would shift or cut rows that are longer than the first.
        table = pd.read_csv(path, names=range(width + 1), **options)
    except ValueError as error:
        raise UserError(
            f"{path} is not a valid UTF-8 CSV: {one_line(error)}; quote values that contain a comma"
        ) from error
    header = [name.strip() for name in table.iloc[0, :width]]
    if len(set(header)) != len(header):
        raise UserError(f"{path} repeats a column: {','.join(header)!r:.200}")
    table = table.iloc[1:]
    fields = table.notna().sum(axis=1)
    if (fields != width).any():
        row = _first(fields != width)
        raise UserError(
            f"{path} row {row}: {fields.iloc[row - 1]} fields, but the first line has {width}; "
            "quote values that contain a comma"
        )
    return table.iloc[:, :width].set_axis(header, axis=1)


def write_table(path: Path, columns: Iterable[str], rows: Iterable[tuple]) -> None:
    """Write a CSV in UTF-8 that `read_table` reads back unchanged."""
    table = pd.DataFrame(list(rows), columns=list(columns), dtype=str)
    table.to_csv(path, index=False, lineterminator="\r\n")


def to_rows(table: pd.DataFrame) -> list[Row]:
    """The rows of a table, with "" for missing columns."""
    table = table.reindex(columns=Row._fields, fill_value="")
    return [Row(*values) for values in table.itertuples(index=False, name=None)]


def _first(found: pd.Series) -> int:
    """The number, from 1, of the first row where `found` is true."""
    return int(found.to_numpy().argmax()) + 1
