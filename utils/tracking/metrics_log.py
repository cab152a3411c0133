"""metrics.jsonl: every number that runs logged, a JSON object a line.

Beside `step`, `time` (seconds since 1970) and `run_id` a line holds numbers by name.
"""

import json
import os
from pathlib import Path

from utils.tracking.journal import METRICS, Line, is_number, is_run_id, is_step, read_lines

ABOUT = ("step", "time", "run_id")  # what a line holds beside numbers
OF_TRAININGS = ("train/", "val/")  # how the names of what a training logs begin


def append(folder: Path, line: Line) -> None:
    """Add a line."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[Line]:
    """All lines but damaged ones; none where nothing was logged yet."""
    path = folder / METRICS
    return read_lines(path, _fits) if path.is_file() else []


def numbers(line: Line) -> dict[str, float]:
    """The numbers of a line, by name."""
    return {name: value for name, value in line.items() if name not in ABOUT}


def _fits(line: Line) -> bool:
    about = is_step(line.get("step")) and is_run_id(line.get("run_id"))
    return about and all(map(is_number, numbers(line).values()))


def mark(folder: Path) -> int:
    """How many bytes there are, all of which have reached the disk."""
    path = folder / METRICS
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def rewind(folder: Path, size: int) -> None:
    """Forget what a training logged after `mark` gave `size`; it will come again.

    What others logged meanwhile, as an evaluation, stays.
    """
    path = folder / METRICS
    if not path.is_file():
        return
    content = path.read_bytes()
    kept = [content[:size]]
    for line in content[size:].splitlines(keepends=True):
        try:
            names = json.loads(line).keys()
        except (ValueError, AttributeError):
            continue  # cut off by a crash
        if not any(name.startswith(OF_TRAININGS) for name in names):
            kept.append(line)
    staging = path.with_name(METRICS + ".tmp")
    staging.write_bytes(b"".join(kept))
    staging.replace(path)
