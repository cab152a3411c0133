"""An indices folder in the making: it appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError
from utils.data.manifest import MANIFEST, write_manifest
from utils.data.table import Row
from utils.files import CHECKSUMS, replace_folder, sha256, verify

META = "meta.json"


@contextmanager
def new_folder(
    folder: Path, rows: Sequence[Row], meta: Any, *, text: bool = False
) -> Iterator[Path]:
    """A folder to put indices.npy (or shards of it) into; in the end the rest is added to it.

    Then it takes the place of the folder before it. After an error nothing is left of it.

    Args:
        folder: where it is to appear; see `check_writable`.
        rows: one for each grid.
        meta: an `IndicesMeta`.
        text: also write indices.txt, a line of space-separated indices for each grid.

    Yields:
        the folder while it is made.
    """
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        write_manifest(staging / MANIFEST, rows)
        if text:
            with (staging / "indices.txt").open("w") as file:
                for path in sorted(staging.glob("indices*.npy")):
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
                    np.savetxt(file, array.reshape(len(array), -1), fmt="%d")
        (staging / META).write_text(json.dumps(asdict(meta), indent=2) + "\n")
        sums = {file.name: sha256(file) for file in staging.iterdir()}
        (staging / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def allocate(path: Path, shape: tuple[int, ...], codebook_size: int) -> np.ndarray:
    """An .npy file to fill in place: zeros of `shape`, of the smallest type for the codebook.

    Raises:
        OSError: the disk has no room for it. Its blocks are claimed here, because a memory map
            that finds no room later ends the process by a signal.
    """
    array = np.lib.format.open_memmap(path, "w+", smallest_type(codebook_size), shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def open_array(path: Path) -> np.ndarray:
    """An .npy file by memory map.

    Raises:
        UserError: the file is missing or damaged.
    """
    verify(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises nearly everything on a damaged header
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged: {line}; make it again") from error


def smallest_type(codebook_size: int) -> np.dtype:
    """The smallest unsigned type that holds every index of a codebook."""
    return np.min_scalar_type(codebook_size - 1)
