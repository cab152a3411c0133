"""What is checked of a file from elsewhere before its content is used: kind, size, place, types."""

import dataclasses
import os
import stat
import types
import typing
from contextlib import suppress
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

    Lists become tuples, which JSON has not, and objects become dataclasses where the field is one.

    Raises:
        UserError: a value that is missing, unknown, of another type or out of its range.
    """
    hints = typing.get_type_hints(make)
    taken = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{name!r:.80} is unknown to this version")
        try:
            taken[name] = _take(value, hints[name])
        except TypeError as error:
            kind = getattr(hints[name], "__name__", hints[name])
            raise UserError(f"{name} must be {kind}, got {value!r:.80}") from error
    for field in dataclasses.fields(make):
        needed = field.default is field.default_factory  # both MISSING
        if needed and field.name not in values:
            raise UserError(f"{field.name} is missing")
    try:
        return make(**taken)
    except (ValueError, ArithmeticError) as error:
        raise UserError(" ".join(str(error).split())[:200]) from error


def _take(value: Any, kind: Any) -> Any:
    """A value of a JSON file as what `kind` annotates, or a TypeError."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        for option in options:
            with suppress(TypeError):
                return _take(value, option)
        raise TypeError
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return typed(kind, value)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {name: _take(one, options[1]) for name, one in value.items()}
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) != len(value):
            raise TypeError
        return tuple(map(_take, value, kinds))
    number = isinstance(value, int) and not isinstance(value, bool)
    fits = kind in (int, float) and abs(value) < LARGEST_INTEGER if number else type(value) is kind
    if not fits:
        raise TypeError
    return value
