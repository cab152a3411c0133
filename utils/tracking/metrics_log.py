"""metrics.jsonl: every number that a run logged, a JSON object a line."""

import json
import os
from pathlib import Path
from typing import Any

from utils.tracking.journal import METRICS, read_lines

OF_TRAININGS = ("train/", "val/")  # how the names of what a training logs begin


def append(folder: Path, line: dict[str, Any]) -> None:
    """Add a line."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines; none where nothing was logged yet."""
    path = folder / METRICS
    return read_lines(path) if path.is_file() else []


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
