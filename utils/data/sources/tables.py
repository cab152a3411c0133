"""Parquet and Arrow files as data sources, also those of Hugging Face datasets; needs pyarrow.

Columns are as in a CSV; `text` is a caption as well. The images are in the first column of bytes or
of {bytes, path}, which is read a row group at a time; without one, `image_path` names files.
"""

import json
import re
from bisect import bisect_right
from collections import OrderedDict
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError, user_error
from utils.data.finding import SPLIT_NAMES
from utils.data.sources import Row, Rows, check_rows, column_name

IMAGES = re.compile("(large_)?binary|struct<bytes:")  # types of columns
CACHE_BYTES = 128 << 20  # of the row groups that a process keeps
_recent: OrderedDict[tuple[Path, int], Any] = OrderedDict()  # row groups, the latest last


def accepts(path: Path) -> bool:
    return path.suffix in (".parquet", ".arrow")


def read_rows(path: Path) -> Rows:
    """The rows of a table, without its images; a UserError as of a CSV."""
    _, schema, image, starts = _open(path)
    names = {column_name(name): name for name in reversed(schema.names) if name != image}
    names = {"caption": names["text"]} | names if "text" in names else names
    if not image and "image_path" not in names:
        found = re.sub(r"\s+", " ", schema.to_string(show_schema_metadata=False))
        raise UserError(f"{path} has no column image_path, and none of bytes: {found:.200}")
    known = [name for name in Row._fields if name in names]
    columns = _read(path, [names[name] for name in known])
    fields = {name: _texts(path, columns, names[name]) for name in known}
    if image:
        fields["image_path"] = [f"{path.name}/{row}" for row in range(starts[-1])]
    if "split" in fields:
        fields["split"] = [SPLIT_NAMES.get(value, value) for value in fields["split"]]
    rows = Rows(fields)
    check_rows(path, known, rows)
    return rows


def read_file(path: Path, name: str) -> bytes:
    """The image in a row, by its number from 0."""
    _, _, image, starts = _open(path)
    group = bisect_right(starts, int(name)) - 1
    if (path, group) not in _recent:
        _recent[path, group] = _read(path, [image], group).flatten().columns[0]  # the bytes
        while len(_recent) > 1 and sum(x.nbytes for x in _recent.values()) > CACHE_BYTES:
            _recent.popitem(last=False)
    _recent.move_to_end((path, group))
    content = _recent[path, group][int(name) - starts[group]].as_py()
    if content is None:
        raise ValueError(f"column {image} has no bytes in this row")
    return content


def read_vectors(path: Path) -> np.ndarray:
    """The vectors (N, L, D), float32, in the column `embedding`: of each row one, or a list.

    Shorter lists end in zeros.
    """
    column = _read(path, ["embedding"])["embedding"].to_numpy()
    rows = [np.atleast_2d(np.array([*value], np.float32)) for value in column]
    vectors = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), np.float32)
    for vector, row in zip(vectors, rows, strict=True):
        vector[: len(row)] = row
    return vectors


@cache
def _open(path: Path) -> tuple[Any, Any, str, list[int]]:
    """The metadata of a Parquet file, or an Arrow table that is mapped into memory; the schema, the
    column of images ("": none), and the first row of each row group, and last the number of rows.
    """
    with user_error(f"{path} needs the package pyarrow: pip install pyarrow", ImportError):
        import pyarrow as pa
        from pyarrow import parquet
    text = f"cannot read {path} (%s); write or download it again"
    with user_error(text, pa.ArrowException, OSError):
        if path.suffix == ".parquet":
            file = parquet.read_metadata(path)
            schema, groups = file.schema.to_arrow_schema(), range(file.num_row_groups)
            sizes = [file.row_group(group).num_rows for group in groups]
        else:
            is_file = pa.memory_map(str(path)).read(6) == b"ARROW1"
            open_arrow = pa.ipc.open_file if is_file else pa.ipc.open_stream
            file = open_arrow(pa.memory_map(str(path))).read_all()
            schema, sizes = file.schema, [len(file)]
    image = next((field.name for field in schema if IMAGES.match(str(field.type))), "")
    return file, schema, image, [*accumulate(sizes, initial=0)]


def _read(path: Path, columns: list[str], group: int | None = None) -> Any:
    """Columns of a row group, or of all, as a pyarrow table."""
    from pyarrow import parquet

    if path.suffix == ".arrow":
        return _open(path)[0].select(columns)
    with parquet.ParquetFile(path, metadata=_open(path)[0]) as table:
        read = table.read if group is None else partial(table.read_row_group, group)
        return read(columns, use_threads=False)


def _texts(path: Path, table: Any, name: str) -> list[str]:
    """A column as text; numbers of classes as their names, where Hugging Face datasets has them."""
    text = f"{path}: column {name} is {table[name].type}; use text or whole numbers"
    with user_error(text, NotImplementedError):
        values = ["" if x is None else x for x in table[name].cast("string").to_pylist()]
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        names = dict(enumerate(features[name]["names"])) | {-1: ""}
        return [names[int(value)] for value in values]
    except (LookupError, TypeError, ValueError):
        return values
