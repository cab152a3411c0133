"""The files of a data set: those that a pattern stands for, and images below a root folder."""

import glob
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from utils import addresses
from utils.cli import UserError, first_few
from utils.progress import ProgressBar

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CONTAINERS = (".tar", ".parquet", ".arrow")  # of many images
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val"}


def find_files(
    path: Path, folder: Path, names: Sequence[str], allow_outside_paths: bool
) -> dict[str, str]:
    """Look for the files named in `path` in a folder: the right spellings of wrong ones, by name.

    A UserError if one is missing, or outside the folder.
    """
    root = os.path.join(os.path.realpath(folder), "")

    @cache  # each folder is read once, which is faster than asking for each file
    def files_in(folder: str) -> dict[str, bool]:
        """The files in a folder, and whether each is below the root."""
        files = {}
        try:
            for entry in os.scandir(os.path.realpath(os.path.join(root, folder))):
                if entry.is_file():
                    file = os.path.realpath(entry) if entry.is_symlink() else entry.path
                    files[entry.name] = file.startswith(root)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return {}
        return files

    def place(name: str) -> bool | None:
        """Whether a file is below the root; None: there is none."""
        folder, slash, file = name.rpartition("/")
        return files_in(folder + slash).get(file)

    thousands = [names[start : start + 1000] for start in range(0, len(names), 1000)]
    bar = ProgressBar(thousands, "looking for files", unit="k files", leave=False, delay=1)
    doubtful = {name: None for part in bar for name in part if not place(name)}
    respelled, missing, outside = {}, [], []
    for name in doubtful:
        found = next((x for x in (name, *_spellings(name)) if place(x) is not None), None)
        if found is None:
            kind = " (a folder, not a file)" if os.path.isdir(os.path.join(root, name)) else ""
            missing.append(name + kind)
        elif not place(found) and not allow_outside_paths:
            outside.append(name)
        elif found != name:
            respelled[name] = found
    for refused, problem in (
        (missing, f"do not exist, relative to {folder}"),
        (outside, "are outside its folder, which --allow_outside_paths accepts"),
    ):
        if refused:
            raise UserError(
                f"{len(refused)} of {len({*names})} files in {path} {problem}: {first_few(refused)}"
            )
    return respelled


def _spellings(name: str) -> Iterator[str]:
    """Other spellings of a path: quoted, as a URL, of the home folder, of Windows, of macOS."""
    name = name.strip().strip("\"'")
    if name.startswith("file://"):
        name = urllib.parse.unquote(urllib.parse.urlsplit(name).path)
    name = os.path.expanduser(name)
    for path in (name, name.replace("\\", "/")):
        for form in ("NFC", "NFD"):
            yield unicodedata.normalize(form, path)


def expand(path: str | Path) -> dict[Path, str]:
    """The sources at a path, a pattern or a list: shards/{00..10}.tar, a.csv,more/*.parquet.

    Each has the split that its name or its folder's states, or "". A folder of files that hold
    images stands for them. A UserError for a pattern without files.
    """
    names, found = [str(path)], []
    if not os.path.exists(path):
        names = _expand_braces(f"{{{path}}}")
    copies = addresses.download(tuple(filter(addresses.is_url, names)), IMAGES + CONTAINERS)
    for name in names:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        matches = [str(copy) for copy in copies.get(name, ())] or matches
        if not matches and (len(names) > 1 or glob.has_magic(name)):
            raise UserError(f"no such file or folder: {name}; correct --path_to_data")
        for match in matches or [name]:
            found += _containers_in(match) or [Path(match)]
    words = ((x, (re.split("[^a-z]", x.name.lower())[0], x.parent.name.lower())) for x in found)
    return {x: next(filter(None, map(SPLIT_NAMES.get, two)), "") for x, two in words}


def _expand_braces(text: str) -> list[str]:
    """a{1,2}b -> a1b, a2b; {08..10} -> 08, 09, 10."""
    braces = re.search(r"\{([^{}]*)\}", text)
    if braces is None:
        return [text]
    parts = braces[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = numbers.groups()
        parts = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    texts = (f"{text[: braces.start()]}{part}{text[braces.end() :]}" for part in parts)
    return [name for text in texts for name in _expand_braces(text)]


def _containers_in(folder: str) -> list[Path]:
    """The files below a folder that hold images; none where there are images as well."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name.lower().endswith(IMAGES) for name in names):
            return []
        found += [Path(place, x) for x in sorted(names) if x.endswith(CONTAINERS) and x[0] != "."]
    return found
