"""Plain text files of codebook indices: a line of space-separated integers for each grid."""

from array import array
from functools import partial
from pathlib import Path

import numpy as np

from utils.cli import UserError
from utils.files import TABLE_BYTES, check_size

LINE_LENGTH = 1 << 24  # characters


def read_lines(path: Path, limit: int) -> np.ndarray:
    """Read a text file whose lines all hold the same number of indices.

    Args:
        path: the file, in UTF-8; empty lines at its end are no lines.
        limit: indices must be below it; 2^32 at most.

    Returns:
        (N, indices a line), uint32.

    Raises:
        UserError: something else than indices, ragged lines, an empty file; says line and number.
    """
    check_size(path, TABLE_BYTES)
    numbers = array("I")  # four bytes each, where a list would take forty
    length = count = 0  # of a line, of lines
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(iter(partial(file.readline, LINE_LENGTH), ""), 1):
            if len(line) == LINE_LENGTH:
                raise UserError(f"{path} line {number}: it has {LINE_LENGTH:,} characters or more")
            words = line.split()
            if not words:
                continue  # at the end it is no line; before another one it is missed there
            if number != count + 1:  # there is an empty line before this one
                has = f"the line has 0 indices, but line 1 has {length}" if count else "no index"
                raise UserError(f"{path} line {count + 1}, number 1: {has}; take empty lines out")
            for column, word in enumerate(words, 1):
                try:
                    numbers.append(_index(word, limit))
                except ValueError as error:
                    raise UserError(f"{path} line {number}, number {column}: {error}") from None
            length, count = length or len(words), number
            if len(words) != length:
                raise UserError(
                    f"{path} line {number}, number {min(len(words), length) + 1}: the line has "
                    f"{len(words)} indices, but line 1 has {length}; all lines need the same number"
                )
    if count == 0:
        raise UserError(f"{path} line 1, number 1: no index; write a line of them for each image")
    return np.array(numbers, np.uint32).reshape(count, length)


def _index(word: str, limit: int) -> int:
    if not (word.isascii() and word.isdecimal()):
        raise ValueError(
            f"{word[:20]!r} is no index; write integers of 0 or more, separated by spaces"
        )
    digits = word.lstrip("0") or "0"
    # Python refuses to read very long numbers; none of them is an index.
    if len(digits) > 10 or int(digits) >= limit:
        raise ValueError(f"index {digits[:20]} is out of range, the codebook has {limit} codes")
    return int(digits)
