"""mlflow.jsonl of an output folder: which run it belongs to, and what was logged besides numbers.

Each line is an object of `time` (seconds since 1970) and one of: `run_id`; `picture` with key and
step; `table`; `folder` or `file` with name; `tag` with value; `status`. Paths are relative to the
output folder where they are in it. What follows a `run_id` belongs to that run.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.untrusted import TABLE_BYTES, check_size

FILE, METRICS, PICTURES = "mlflow.jsonl", "metrics.jsonl", "pictures"


def note(output_dir: Path, seconds: float | None = None, **entry: object) -> None:
    """Append an entry, taken now or at a time in `seconds` since 1970."""
    seconds = time.time() if seconds is None else seconds
    with (output_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": seconds, **entry}) + "\n")


def place(path: Path, output_dir: Path) -> str:
    """A path as the journal has it: still right when the output folder is moved."""
    inside = Path(os.path.abspath(path)), Path(os.path.abspath(output_dir))
    return str(inside[0].relative_to(inside[1]) if inside[0].is_relative_to(inside[1]) else path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, but for lines that a crash cut short.

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
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("time"), float)]
