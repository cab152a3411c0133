"""mlflow.jsonl of an output folder: what runs logged besides numbers, for a replay to MLflow.

Each line is an object of `time` (seconds since 1970), `run_id`, and one of those in `KINDS`, or
none where a later stage opened the run. Paths are relative to the folder where they are in it.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import provenance
from utils.cli import UserError
from utils.files import TABLE_BYTES, check_size

FILE, METRICS, PICTURES = "mlflow.jsonl", "metrics.jsonl", "pictures"
KINDS: dict[str, dict[str, type]] = {  # by the key that tells them, the others and their types
    "picture": {"picture": str, "key": str, "step": int},
    "table": {"table": str},
    "folder": {"folder": str, "name": str},
    "file": {"file": str, "name": str},
    "lineage": {"lineage": list},
    "model": {"model": str, "values": dict, "step": int, "register": str, "lower": bool},
    "status": {"status": str},  # RUNNING where a training opened the run, then how it ended
}
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")
LAST_SECOND = 1e11  # since 1970; and whatever counts steps stays far below
Line = dict[str, Any]


class Journal:
    """Where one run keeps what it logs.

    Attributes:
        pictures: the folder of its pictures.
    """

    def __init__(self, folder: Path, run_id: str, part: str = "") -> None:
        """Name the files.

        Args:
            folder: where they are.
            run_id: of the run.
            part: what the run writes in `folder`, if it is not all of it: a name before those of
                journal and pictures, which keeps them apart from others'.
        """
        prefix = f"{part}." if part else ""
        self._folder, self._run_id = folder, run_id
        self._file, self.pictures = folder / f"{prefix}{FILE}", folder / f"{prefix}{PICTURES}"

    def note(self, seconds: float | None = None, **entry: object) -> None:
        """Append an entry, taken now or at a time in `seconds` since 1970."""
        seconds = time.time() if seconds is None else seconds
        line = {"time": seconds, "run_id": self._run_id, **entry}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def place(self, path: Path) -> str:
        """A path as the journal has it: still right when the folder is moved."""
        inside, home = Path(os.path.abspath(path)), Path(os.path.abspath(self._folder))
        return str(inside.relative_to(home) if inside.is_relative_to(home) else path)


def read(folder: Path) -> list[Line]:
    """The entries of all journals in a folder, in the order of time.

    Raises:
        UserError: there is none.
    """
    paths = sorted(folder.glob(f"*{FILE}")) or [folder / FILE]
    entries = [entry for path in paths for entry in read_lines(path, _is_entry)]
    return sorted(entries, key=lambda entry: entry["time"])


def read_lines(path: Path, fits: Callable[[Line], bool]) -> list[Line]:
    """The objects of a file of JSON lines that have a `time` and that `fits` accepts.

    Others, such as a line that a crash cut short, are left out, which is said.

    Raises:
        UserError: no such file.
    """
    try:
        check_size(path, TABLE_BYTES)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; give the output folder of a run") from error
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and _is_time(value.get("time")) and fits(value):
            found.append(value)
    if len(found) < len(lines):
        count = len(lines) - len(found)
        print(f"warning: {path}: damaged lines are left out: {count}", file=sys.stderr)
    return found


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold, be it infinite or NaN."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 1000)


def is_step(value: object) -> bool:
    """Whether a JSON value counts steps."""
    return type(value) is int and abs(value) < LAST_SECOND


def is_run_id(value: object) -> bool:
    """Whether a JSON value may be the id of an MLflow run."""
    return isinstance(value, str) and bool(re.fullmatch(r"[\w-]{1,80}", value, re.ASCII))


def _is_time(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and 0 <= value < LAST_SECOND


def _is_entry(line: Line) -> bool:
    kinds = KINDS.keys() & line.keys()
    fields = {key: kind for one in kinds for key, kind in KINDS[one].items()}
    if len(kinds) > 1 or any(type(line.get(key)) is not kind for key, kind in fields.items()):
        return False
    try:
        provenance.parse(line.get("lineage", []))
    except ValueError:
        return False
    values = line.get("values", {"": 0})
    return (
        is_run_id(line.get("run_id"))
        and is_step(line.get("step", 0))
        and line.get("status", STATUSES[0]) in STATUSES
        and bool(values)
        and all(map(is_number, values.values()))
    )
