"""Tar files as data sources, as WebDataset writes them: files of one name are one sample.

1.jpg is an image, 1.cls its label, 1.txt its caption, and 1.json an object with any of label, split
and caption. An index of the images is made once per archive. Unlike reading in sequence, it gives
any image at any time: the order of an epoch is a function of seed and epoch, also when resumed.
"""

import hashlib
import json
import os
import posixpath
import tarfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from utils.cli import UserError, one_line
from utils.data.finding import IMAGES, SPLIT_NAMES
from utils.data.sources import Row, check_rows
from utils.files import CACHE


def accepts(path: Path) -> bool:
    return path.suffix in (".tar", ".tgz") or ".tar." in path.name


def read_rows(path: Path) -> list[Row]:
    """The samples of a tar file; a UserError for a damaged one, and for a sample without image."""
    rows = [Row(f"{path.name}/{name}", *values[2:]) for name, values in _index(path).items()]
    check_rows(path, ["split"] * any(row.split for row in rows), rows)
    return rows


def read_file(path: Path, name: str) -> bytes:
    """The content of an image in a tar file."""
    offset, size = _index(path)[name][:2]
    with path.open("rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) < size:
        raise ValueError("the tar file ends within it")
    return content


@cache
def _index(path: Path) -> dict[str, list[Any]]:
    """Offset, size, label, split, "" and caption of each image by name; cached by size and time."""
    about = path.stat()
    key = f"{path.resolve()}/{about.st_size}/{about.st_mtime_ns}"
    file = CACHE / f"tar-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        return json.loads(file.read_bytes())
    index = dict(_read_sample(path, key, values) for key, values in _read_members(path).items())
    with suppress(OSError):  # the cache saves time only
        CACHE.mkdir(parents=True, exist_ok=True)
        staging = file.with_suffix(f".{os.getpid()}")  # of this process alone
        staging.write_text(json.dumps(index))
        staging.replace(file)
    return index


def _read_members(path: Path) -> dict[str, dict[str, Any]]:
    """The name, offset and size of each file, or its text, by the key and ending of its name."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all
                folder, base = posixpath.split(posixpath.normpath(member.name))
                key, _, ending = base.partition(".")
                if not member.isreg() or not key:
                    continue
                value: Any = posixpath.join(folder, base), member.offset_data, member.size
                if ending in ("cls", "txt", "json"):
                    value = archive.extractfile(member).read().decode().strip()
                    value = json.loads(value) if ending == "json" else value
                samples.setdefault(posixpath.join(folder, key), {})[ending.lower()] = value
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} as an uncompressed tar file: {one_line(error)}, after sample "
            f"{next(reversed(samples), '(none)')}; write or download it again"
        ) from error
    return samples


def _read_sample(path: Path, key: str, files: dict[str, Any]) -> tuple[str, list[Any]]:
    more, image = files.get("json", {}), next((x[1:] for x in IMAGES if x[1:] in files), "")
    if not image or not isinstance(more, dict):
        found = ", ".join(files)
        raise UserError(f"{path}: sample {key} needs an image, and JSON an object; it has {found}")
    name, *place = files[image]
    split, label = str(more.get("split", "")), files.get("cls", more.get("label"))
    texts = "" if label is None else str(label), SPLIT_NAMES.get(split, split), ""
    return name, [*place, *texts, str(files.get("txt") or more.get("caption") or "")]
