"""Decoded images on disk, memory-mapped: the next run over the same files starts at once."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from utils.cli import UserError
from utils.data import decoding
from utils.files import is_intact, new_folder, read_json

SUFFIX = ".pixels"  # of the folders
PIXELS, META = "pixels.npy", "meta.json"
MIN_SECONDS = 2.0  # what took less is decoded again
KEPT = 10  # data sets, those used last
MAX_SHARE = 10  # one of so many parts of the free disk


def folder_of(cache_dir: str, files: Sequence[str], options: object) -> Path:
    """The folder of the cache for the pixels of these files, decoded with these options.

    Its name is a digest of all that decides them: path, size and time of change of each file, the
    options, and the code that decodes.
    """
    digest = hashlib.sha256(Path(decoding.__file__).read_bytes())
    digest.update(repr((PIL.__version__, options)).encode())
    for file in files:
        status = _status(file)
        identity = os.path.abspath(file), status.st_size, status.st_mtime_ns
        digest.update(repr(identity).encode())
    return Path(cache_dir) / (digest.hexdigest()[:32] + SUFFIX)


def _status(file: str) -> os.stat_result:
    """That of a file, or of the one that it is inside of, such as x.tar of x.tar/a.png."""
    try:
        return os.stat(file)
    except NotADirectoryError:
        return _status(os.path.dirname(file))


def read(folder: Path | None, max_memory: int) -> tuple[np.ndarray, dict[str, Any]] | None:
    """The pixels, (N, channels, height, width) uint8, and `meta` of `write`; None without both.

    A damaged folder counts as none, and so do pixels of more than `max_memory` bytes.
    """
    with suppress(OSError, ValueError, UserError):
        if folder is not None and is_intact(folder):
            pixels = np.load(folder / PIXELS, mmap_mode="c", allow_pickle=False)
            os.utime(folder)
            return (pixels, read_json(folder / META)) if pixels.nbytes <= max_memory else None
    return None


def write(folder: Path | None, pixels: np.ndarray, meta: dict[str, Any]) -> None:
    """Keep pixels for the next run; nothing happens without room on the disk.

    Each process writes a folder of its own, and the first that is ready takes the name.
    """
    if folder is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    own = folder.with_name(f"{folder.name}-{os.getpid()}")
    with suppress(OSError, UserError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if pixels.nbytes > shutil.disk_usage(folder.parent).free // MAX_SHARE:
            return
        with new_folder(own) as staging:
            np.save(staging / PIXELS, pixels)
            (staging / META).write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)  # it was damaged, or is the same
        own.rename(folder)
        folders = folder.parent.glob("*" + SUFFIX)
        used = sorted(folders, key=lambda path: -path.stat().st_mtime)
        for old in used[KEPT:]:
            shutil.rmtree(old)
    shutil.rmtree(own, ignore_errors=True)
