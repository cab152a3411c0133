"""What is checked of a file from elsewhere before its content is used: kind, size, place, types."""

import dataclasses
import os
import stat
import types
import typing
from pathlib import Path
from typing import Any

from utils.cli import UserError

JSON_BYTES = 64 << 20
TABLE_BYTES = 4 << 30  # of a CSV, a manifest or a text file of indices
LARGEST_INTEGER = 1 << 63


def check_size(path: Path, limit: int) -> None:
    """Refuse what is no plain file, as a pipe or a device, and what is too large for its kind.

    Raises:
        OSError: no such file.
        UserError: it is refused.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no plain file; give one that can be read to its end")
    if status.st_size > limit:
        raise UserError(
            f"{path} has {status.st_size:,} bytes, but such a file may have {limit:,} at most; "
            "give another, or fewer images at once"
        )


def check_links(folder: Path) -> None:
    """Refuse a folder in which a symbolic link leads out of it.

    Raises:
        UserError: one does.
    """
    home = os.path.realpath(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            target = os.path.realpath(entry.path)
            if entry.is_symlink() and not target.startswith(home + os.sep):
                raise UserError(
                    f"{entry.path} is a link that leads out of its folder, to {target}; put the "
                    "file itself there"
                )


def typed(make: type, values: dict[str, Any]) -> Any:
    """A dataclass from the values of a JSON file, each of the type that its field says.

    Lists become tuples, which JSON has not.

    Raises:
        UserError: a value that is missing, unknown, of another type or out of its range.
    """
    hints = typing.get_type_hints(make)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{name!r:.80} is unknown to this version")
        if not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", hints[name])
            raise UserError(f"{name} must be {kind}, got {value!r:.80}")
    for field in dataclasses.fields(make):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f"{field.name} is missing")
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    try:
        return make(**values | tuples)
    except (ValueError, ArithmeticError) as error:
        raise UserError(" ".join(str(error).split())[:200]) from error


def _fits(value: object, kind: Any) -> bool:
    """Whether a value of a JSON file may stand where `kind` is annotated."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in options)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) < LARGEST_INTEGER
    return isinstance(value, kind)
