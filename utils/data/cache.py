"""Decoded images, kept in files that the next run maps into memory."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.files import CACHE

# In the path of a file inside of one.
CONTAINER = re.compile(r"\.(tar(\.\w+)?|tgz|parquet|arrow)/")
CACHE_BYTES = 20 << 30  # of all cached pixels; nor may a file take over a tenth of the free disk


class PixelCache:
    """The pixels of image files, by the state of the files and the options of their decoding."""

    def __init__(self, files: Sequence[str], *way: object) -> None:
        """Any change to the files (path, size, time) or to the way they are read is another key."""
        inside = [CONTAINER.search(file) for file in files]
        stored = {x.string[: x.end() - 1] if x else y for x, y in zip(inside, files, strict=True)}
        states = [(x.st_size, x.st_mtime_ns) for x in map(os.stat, sorted(stored))]
        self._key = hashlib.sha256(repr((way, files, states)).encode()).hexdigest()

    def _file(self, options: object) -> Path:
        digest = hashlib.sha256(repr((self._key, options)).encode()).hexdigest()
        return CACHE / f"images-{digest[:16]}.json"

    def read(self, options: object) -> tuple[Tensor, list[Any], dict[int, str]] | None:
        """What `write` was given for these options, or None."""
        with suppress(OSError, ValueError, LookupError):
            about = json.loads(self._file(options).read_bytes())
            pixels = np.load(CACHE / about["pixels"], mmap_mode="c")
            os.utime(CACHE / about["pixels"])
            found = [tuple(x) if isinstance(x, list) else x for x in about["options"]]
            bad = {int(row): complaint for row, complaint in about["bad"].items()}
            return torch.from_numpy(pixels).permute(0, 3, 1, 2), found, bad
        return None

    def write(
        self, options: object, pixels: Tensor, found: tuple[Any, ...], bad: dict[int, str]
    ) -> None:
        """Keep (N, C, H, W) pixels, the options that were found, and the rows of bad files.

        A later stage, which gives all options, finds them as well. Pixels that were not used for
        the longest time make room.
        """
        stored = self._file(found).with_suffix(".npy")
        staging = stored.with_suffix(f".{os.getpid()}")  # of this process alone
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            if pixels.nbytes < min(CACHE_BYTES, shutil.disk_usage(CACHE).free // 10):
                with staging.open("wb") as stream:
                    np.save(stream, pixels.permute(0, 2, 3, 1).numpy())
                staging.replace(stored)
                about = json.dumps({"pixels": stored.name, "options": found, "bad": bad})
                for file in (self._file(options), self._file(found)):
                    file.write_text(about)
            kept = sorted(CACHE.glob("images-*.npy"), key=lambda x: x.stat().st_mtime)
            while sum(x.stat().st_size for x in kept) > CACHE_BYTES:
                kept.pop(0).unlink()
        except OSError:  # the cache saves time only
            staging.unlink(missing_ok=True)
