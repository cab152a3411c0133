"""Files and folders: checked before they are read, written completely or not at all, verified."""

import dataclasses
import hashlib
import json
import os
import shutil
import stat
import types
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from utils.cli import UserError

CHECKSUMS = "sha256.json"
TEMPORARY = ".tmp"  # ends the name of a folder that is being written
JSON_BYTES = 64 << 20
TABLE_BYTES = 4 << 30  # of a CSV, a manifest or a text file of indices
LARGEST_INTEGER = 1 << 63


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write a folder that exists whole or not at all, also after a crash or a lost machine.

    Args:
        folder: where to; takes the place of what is there.
        files: contents by name: state dicts for *.safetensors, plain values for *.json.

    Raises:
        UserError: the disk is full; what was there before still is.
    """
    replace_folder(_stage(folder, files), folder)
    flush(folder.parent)


def check_unused(folder: Path) -> None:
    """Refuse to write where something is already.

    Raises:
        UserError: it is a file, or a folder that is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another --output_dir, or move it away")


def write_new_folder(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """`write_folder` where nothing is yet."""
    _stage(folder, files).rename(folder)
    flush(folder.parent)


def _stage(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """The files on the disk in a temporary folder, the manifest of their SHA-256 last."""
    staging = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _check_space(staging, files)
        for name, content in files.items():
            if name.endswith(".safetensors"):
                # safetensors stores row-major only; clones keep tied weights and views apart.
                tensors = {
                    key: value.detach().to("cpu", copy=True).contiguous()
                    for key, value in content.items()
                }
                safetensors.torch.save_file(tensors, staging / name)
            else:
                (staging / name).write_text(json.dumps(content, indent=2) + "\n")
            flush(staging / name)
        sums = {name: sha256(staging / name) for name in files}
        (staging / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
        flush(staging / CHECKSUMS)
        flush(staging)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"cannot write {folder} ({error}); what was saved before is whole: make room on the "
            "disk, then --resume"
        ) from error
    return staging


def _check_space(staging: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise an OSError where the tensors would not fit on the disk."""
    needed = 1 << 20  # for names and numbers
    for name, content in files.items():
        if name.endswith(".safetensors"):
            needed += sum(value.nbytes for value in content.values())
    free = shutil.disk_usage(staging).free
    if free < needed:
        raise OSError(f"it takes {needed / 2**20:,.0f} MiB, but {free / 2**20:,.0f} are free")


def replace_folder(staging: Path, folder: Path) -> None:
    """Put a finished folder in the place of another, of which nothing is ever half there."""
    old = _old_name(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def intact_folder(folder: Path) -> Path:
    """`folder`, or what it was if a crash hit `replace_folder` between its renames."""
    old = _old_name(folder)
    return old if not folder.exists() and old.exists() else folder


def _old_name(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def flush(path: Path) -> None:
    """Make sure that a file or a folder's list of names has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of at most 64 MiB.

    Raises:
        UserError: no such file, or no JSON object.
    """
    try:
        check_size(path, JSON_BYTES)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def verify(path: Path) -> None:
    """Check a file against the SHA-256 that its folder holds, where it does.

    Raises:
        UserError: the file is another than was written.
    """
    if (path.parent / CHECKSUMS).is_file():
        expected = read_json(path.parent / CHECKSUMS).get(path.name)
        try:
            found = expected and sha256(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from error
        if found != expected:
            raise UserError(
                f"{path} is damaged: its SHA-256 is not that in {CHECKSUMS}; copy it again - or, "
                f"if you changed it on purpose, take its line out of {CHECKSUMS}"
            )


def is_intact(folder: Path) -> bool:
    """Whether all files that a folder was written with are there, unchanged."""
    try:
        sums = read_json(folder / CHECKSUMS)
        return all(sha256(folder / name) == sums[name] for name in sums)
    except (OSError, ValueError, UserError):
        return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, verified.

    Raises:
        UserError: no such file, or a damaged one.
    """
    try:
        verify(path)
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


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
