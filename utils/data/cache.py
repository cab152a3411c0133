"""Decoded images, kept in files that the next run maps into memory."""

import json
import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.files import CACHE, flush

CACHE_BYTES = 20 << 30  # of all cached images
FREE_PART = 10  # cached images take at most this part of the free disk
_writers: list[Thread] = []


class PixelCache:
    """Pixels by the state of their files, and by options of decoding (None: to be found there)."""

    def __init__(self, files: Sequence[str], containers: Sequence[str], reader: object) -> None:
        """Of files, their archives or "", and how they are read. An OSError if a file vanished."""
        digest, stored = sha256(repr(reader).encode()), set()
        for file, container in zip(files, containers, strict=True):
            digest.update(f"{file}\n".encode(errors="surrogateescape"))
            stored.add(container or file)
        for file in sorted(stored):
            about = os.stat(file)
            digest.update(f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}\n".encode())
        self._key = digest.hexdigest()

    def _file(self, options: object) -> Path:
        name = sha256(repr((self._key, options)).encode()).hexdigest()[:16]
        return CACHE.absolute() / f"images-{name}.json"

    def read(self, options: object) -> tuple[Tensor, list[Any], dict[int, str]] | None:
        """What `write` was given for these options, or None."""
        while _writers:
            _writers.pop().join()
        with suppress(OSError, EOFError, ValueError, LookupError):
            file = self._file(options)
            about = json.loads(file.read_bytes())
            stored = file.with_name(f"{about['pixels']}.npy")
            pixels = np.load(stored, mmap_mode="c", allow_pickle=False)
            with suppress(OSError):  # of another user
                os.utime(stored)
                os.utime(file)
            found = [tuple(x) if isinstance(x, list) else x for x in about["options"]]
            bad = {int(row): complaint for row, complaint in about["bad"].items()}
            return torch.from_numpy(pixels).permute(0, 3, 1, 2), found, bad
        return None

    def write(self, options: object, pixels: Tensor, found: object, bad: dict[int, str]) -> None:
        """Keep (N, C, H, W) pixels, the options with what was found, and the rows of bad files.

        A later stage, which gives all options, finds them as well. A thread writes them.
        """
        about = json.dumps({"pixels": self._file(found).stem, "options": found, "bad": bad})
        jobs = [self._file(options), self._file(found)], about, pixels.permute(0, 2, 3, 1).numpy()
        _writers.append(Thread(target=_write, args=jobs))
        _writers[-1].start()


def _write(files: list[Path], about: str, pixels: np.ndarray) -> None:
    """Write pixels, and about them, where there is room; the longest unused files go."""
    folder, stored = files[-1].parent, files[-1].with_suffix(".npy")
    staging = stored.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
    with suppress(OSError):  # the cache saves time only
        folder.mkdir(parents=True, exist_ok=True)
        if pixels.nbytes > min(CACHE_BYTES, shutil.disk_usage(folder).free // FREE_PART):
            return
        try:
            with staging.open("wb") as stream:
                np.save(stream, pixels)
            flush(staging)
            staging.replace(stored)
        finally:
            staging.unlink(missing_ok=True)
        for file in files:
            file.write_text(about)
        kept = sorted(folder.glob("images-*"), key=lambda x: x.stat().st_mtime)
        while sum(x.stat().st_size for x in kept) > CACHE_BYTES:
            kept.pop(0).unlink()
