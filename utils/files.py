"""Files and folders: checked before they are read, written completely or not at all, verified."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from utils.cli import UserError, check_writable, one_line, unused, user_error

CACHE = Path("outputs/cache")  # of what can be made again
CHECKSUMS = "sha256.json"
LOCK, OWNER = "lock", "owner"  # in an output folder, and which process on which host writes to it
NO_LOCKS = errno.ENOLCK, errno.EOPNOTSUPP  # of some network file systems
LOCK_SECONDS = 5  # that a killed process may take to let go of it
TEMPORARY = ".tmp"  # ends the name of a folder that is being written
MADE_FROM = "made_from"  # in a folder that is being written, and may be continued
SEAL = ".sha256"  # ends the name of the file that holds the SHA-256 of a finished one
JSON_BYTES = 64 << 20
TABLE_BYTES = 4 << 30  # of a CSV, a manifest or a text file of indices
Files = dict[str, dict[str, Any]]  # state dicts for *.safetensors, plain values for *.json


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: Path, files: Files, written: Iterable[Path] = ()) -> None:
    """Write or replace a folder of `files`, and move those `written` there; see `new_folder`."""
    with new_folder(folder) as staging:
        for name, content in files.items():
            if name.endswith(".safetensors"):
                # safetensors stores row-major only; clones separate tied weights and views.
                tensors = {
                    key: value.detach().to("cpu", copy=True).contiguous()
                    for key, value in content.items()
                }
                safetensors.torch.save_file(tensors, staging / name)
            else:
                (staging / name).write_text(json.dumps(content, indent=2) + "\n")
        for path in written:
            path.rename(staging / path.name)


@contextmanager
def new_folder(folder: Path, staging: Path | None = None) -> Iterator[Path]:
    """A temporary folder to fill, which then takes the name of `folder`, with a file of SHA-256.

    No incomplete folder ever has that name. A UserError if the disk is full; what had the name
    before is unchanged then. `staging` is one of `resume_staging`, which an error leaves there.
    """
    kept, staging = staging, staging or folder.with_name(folder.name + TEMPORARY)
    if kept is None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    with disk_errors(folder):
        try:
            yield staging
            seals = {path.stem: path for path in staging.glob(f"*{SEAL}")}
            ours = {*(path.name for path in seals.values()), MADE_FROM, CHECKSUMS}
            names = sorted({path.name for path in staging.iterdir()} - ours)
            sums = {x: seals[x].read_text() if x in seals else sha256(staging / x) for x in names}
            (staging / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
            for path in (*staging.iterdir(), staging):
                flush(path)
            old = folder.with_name(folder.name + ".old")
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            staging.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
            for name in (*(path.name for path in seals.values()), MADE_FROM):
                (folder / name).unlink(missing_ok=True)
            flush(folder.parent)
        finally:
            if kept is None:
                shutil.rmtree(staging, ignore_errors=True)


def disk_errors(folder: Path) -> AbstractContextManager[None]:
    """A UserError if what is written for `folder` fails, as on a full disk."""
    text = f"cannot write {folder} (%s); what was saved before is intact: make room on the disk, "
    text += "then run it again (a training with --resume)"
    return user_error(text, OSError, safetensors.SafetensorError)


def resume_staging(folder: Path, made_from: str) -> Path:
    """The temporary folder of `new_folder`, with what an interrupted command has left in it.

    It is empty unless that command, too, was to write what is `made_from` this.
    """
    staging = folder.with_name(folder.name + TEMPORARY)
    mark = staging / MADE_FROM
    with disk_errors(folder):
        if not (mark.is_file() and mark.read_text() == made_from):
            if mark.is_file():
                print(f"{staging} is of a command with other data or flags: it is made anew")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            mark.write_text(made_from)
        for path in {*staging.iterdir()} - {mark, *staging.glob(f"*{SEAL}")}:
            if not path.with_name(path.name + SEAL).exists():
                path.unlink()
    return staging


def seal(path: Path) -> None:
    """Record the SHA-256 of a file that is finished."""
    flush(path)
    path.with_name(path.name + SEAL).write_text(sha256(path))


def is_sealed(path: Path) -> bool:
    """Whether a file is finished, and unchanged since."""
    record = path.with_name(path.name + SEAL)
    return record.is_file() and path.is_file() and record.read_text() == sha256(path)


def intact_folder(folder: Path) -> Path:
    """`folder`, or its former content if a crash came between the renames of `new_folder`."""
    old = folder.with_name(folder.name + ".old")
    return old if not folder.exists() and old.exists() else folder


def discard(folder: Path) -> None:
    """Remove a folder; at no time does a part of it have its name."""
    gone = folder.with_name(f"{folder.name}.old{TEMPORARY}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def lock_folder(folder: Path) -> FileLock:
    """Become the only writer of a folder, until the lock is released or the process ends.

    The system releases the lock of a process that is gone, so that none is ever stale. A UserError
    that names the host and the process if there is another writer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        who = owner.read_text() if owner.is_file() else "another process"
        raise UserError(
            f"{who} is writing to {folder}; wait for its end, or choose another --output_dir"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def check_unused(folder: Path, ours: str = "") -> None:
    """A UserError if `folder` cannot be written, or is not empty and without the file `ours`."""
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()) and not (ours and (folder / ours).is_file()):
        raise UserError(
            f"{folder} exists and is not empty; choose another --output_dir, or move it away"
        )


def choose_output_dir(given: str, default: Path, ours: str) -> Path:
    """The folder that is given, or a new one, by `unused`; a UserError as in `check_unused`."""
    folder = Path(given or unused(default))
    check_unused(folder, ours)
    return folder


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of at most 64 MiB; a UserError if there is none."""
    try:
        check_size(path, JSON_BYTES)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, verified; a UserError if it is missing or damaged."""
    try:
        verify(path)
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def verify(path: Path) -> None:
    """Compare a file with the SHA-256 in its folder, if any; a UserError if they differ."""
    expected = recorded_sha256(path)
    if expected and not (path.is_file() and sha256(path) == expected):
        raise UserError(
            f"{path} is damaged: its SHA-256 is not that in {CHECKSUMS}; copy it again - or, "
            f"if you changed it on purpose, remove its line from {CHECKSUMS}"
        )


def recorded_sha256(path: Path) -> str:
    """The SHA-256 that a file was written with, or "" if its folder has no record of it."""
    sums = path.parent / CHECKSUMS
    return read_json(sums).get(path.name, "") if sums.is_file() else ""


def is_intact(folder: Path) -> bool:
    """Whether all files that a folder was written with are there, unchanged."""
    try:
        for name in read_json(folder / CHECKSUMS):
            verify(folder / name)
    except (OSError, UserError):
        return False
    return True


def check_size(path: Path, limit: int) -> None:
    """A UserError for more than `limit` bytes, or for no regular file, such as a pipe."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; give one that can be read to its end")
    if status.st_size > limit:
        raise UserError(
            f"{path} has {status.st_size:,} bytes, but such a file may have {limit:,} at most; "
            "give another, or fewer images at once"
        )


def check_links(folder: Path) -> None:
    """A UserError if a symbolic link in a folder leads out of it."""
    home = os.path.realpath(folder)
    for path in folder.iterdir():
        target = os.path.realpath(path)
        if path.is_symlink() and not target.startswith(home + os.sep):
            raise UserError(
                f"{path} is a link that leads out of its folder, to {target}; put the file itself "
                "there"
            )


def typed(make: type, values: dict[str, Any]) -> Any:
    """A dataclass from the values of a JSON file, each of the type that its field declares.

    Lists become tuples, and objects become dataclasses where the field is one. A UserError if a
    value is missing, unknown, of another type or out of its range.
    """
    hints = typing.get_type_hints(make)
    converted = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{name!r:.80} is unknown to this version")
        try:
            converted[name] = _convert(value, hints[name])
        except TypeError as error:
            kind = getattr(hints[name], "__name__", hints[name])
            raise UserError(f"{name} must be {kind}, got {value!r:.80}") from error
    try:
        return make(**converted)
    except (TypeError, ValueError, ArithmeticError) as error:  # TypeError: a value is missing
        raise UserError(one_line(error)) from error


def _convert(value: Any, kind: Any) -> Any:
    """A JSON value as the annotation `kind` declares it, or a TypeError."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        for option in options:
            with suppress(TypeError):
                return _convert(value, option)
        raise TypeError
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return typed(typing.cast(type, kind), value)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {name: _convert(one, options[1]) for name, one in value.items()}
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) != len(value):
            raise TypeError
        return tuple(map(_convert, value, kinds))
    number = isinstance(value, int) and not isinstance(value, bool)
    fits = kind in (int, float) and abs(value) < 1 << 63 if number else type(value) is kind
    if not fits:
        raise TypeError
    return value
