"""Plain text files of codebook indices: a line of space-separated integers for each grid."""

from pathlib import Path

import numpy as np

from utils.cli import UserError


def read_lines(path: Path, limit: int) -> np.ndarray:
    """Read a text file whose lines all hold the same number of indices.

    Args:
        path: the file, in UTF-8; empty lines at its end are no lines.
        limit: indices must be below it.

    Returns:
        (N, indices a line), uint32.

    Raises:
        UserError: something else than indices, ragged lines, an empty file; says line and number.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").rstrip().split("\n")
    length = len(lines[0].split())
    if length == 0:
        raise UserError(f"{path} line 1, number 1: no index; write a line of them for each image")
    grids: list[list[int]] = []
    for number, line in enumerate(lines):
        grid = [
            _index(word, limit, f"{path} line {number + 1}, number {column + 1}")
            for column, word in enumerate(line.split())
        ]
        if len(grid) != length:
            raise UserError(
                f"{path} line {number + 1}, number {min(len(grid), length) + 1}: the line has "
                f"{len(grid)} indices, but line 1 has {length}; all lines need the same number"
            )
        grids.append(grid)
    return np.array(grids, np.uint32)


def _index(word: str, limit: int, where: str) -> int:
    if not (word.isascii() and word.isdecimal()):
        raise UserError(
            f"{where}: {word[:20]!r} is no index; write integers of 0 or more, separated by spaces"
        )
    digits = word.lstrip("0") or "0"
    # Python refuses to read very long numbers; none of them is an index.
    if len(digits) > 10 or int(digits) >= limit:
        raise UserError(
            f"{where}: index {digits[:20]} is out of range, the codebook has {limit} codes"
        )
    return int(digits)
