"""The image files of a data set, each looked for below a root folder."""

import os
import unicodedata
import urllib.parse
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from utils.cli import UserError, first_few
from utils.progress import ProgressBar


def find_files(
    path: Path, folder: Path, names: Collection[str], allow_outside_paths: bool
) -> dict[str, str]:
    """Look for the files named in `path` in a folder: the right spellings of wrong ones, by name.

    A UserError if one is missing, or outside the folder.
    """
    root = os.path.realpath(folder)

    def is_below(real: str) -> bool:
        return f"{real}/".startswith(f"{root}/")

    @cache  # each folder is read once, which is faster than asking for each file
    def files_in(folder: str) -> dict[str, bool]:
        """The files in a folder, and whether each is below the root."""
        files = {}
        try:
            real = os.path.realpath(os.path.join(root, folder))
            below = is_below(real)
            for entry in os.scandir(real):
                if entry.is_file(follow_symlinks=False):
                    files[entry.name] = below
                elif entry.is_file():
                    files[entry.name] = is_below(os.path.realpath(entry))
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return {}
        return files

    def place(name: str) -> bool | None:
        """Whether a file is below the root; None: there is none."""
        folder, slash, file = name.rpartition("/")
        return files_in(folder + slash).get(file)

    doubtful, folder_of_files, files = [], "", files_in("")
    for name in ProgressBar(names, "looking for files", unit=" files", leave=False, delay=1):
        start = name.rfind("/") + 1  # as in `place`, without two calls for each of a million names
        if name[:start] != folder_of_files:
            folder_of_files, files = name[:start], files_in(name[:start])
        if not files.get(name[start:]):
            doubtful.append(name)
    respelled, missing, outside = {}, [], []
    for name in doubtful:
        below = place(name)
        if below is None:
            respelled[name] = next((x for x in _spellings(name) if place(x) is not None), "")
            below = place(respelled[name])
        if below is None:
            kind = " (a folder, not a file)" if os.path.isdir(os.path.join(root, name)) else ""
            missing.append(name + kind)
        elif not below and not allow_outside_paths:
            outside.append(name)
    for refused, problem in (
        (missing, f"do not exist, relative to {folder}"),
        (outside, "are outside its folder, which --allow_outside_paths accepts"),
    ):
        if refused:
            raise UserError(
                f"{len(refused)} of {len(names)} files in {path} {problem}: {first_few(refused)}"
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
