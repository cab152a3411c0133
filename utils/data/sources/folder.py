"""A folder of images as a data source: a subfolder for each class, or images without labels.

Below subfolders named train and val, the classes of each are those of one side of the split.
"""

import os
from pathlib import Path

from utils.cli import UserError, first_few
from utils.data.finding import IMAGES, SPLIT_NAMES
from utils.data.sources import Row, note


def accepts(path: Path) -> bool:
    return path.is_dir()


def read_rows(path: Path) -> list[Row]:
    """The images of a folder, in the order of their paths; a UserError if there are none."""
    files = sorted(
        os.path.join(folder, name).removeprefix(os.path.join(path, "")).replace(os.sep, "/")
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
        if not name.startswith(".")
    )
    images = [name for name in files if name.lower().endswith(IMAGES)]
    others = sorted(set(files) - set(images))
    if not images:
        raise UserError(
            f"no images below {path}; give a CSV of image paths, or a folder with a folder of "
            f"images for each class{f' (found: {first_few(others)})' if others else ''}"
        )
    parts = [name.split("/") for name in images]
    splits = {SPLIT_NAMES.get(x[0].lower(), "") for x in parts if len(x) > 1}
    has_split = {"train", "val"} <= splits
    rows = []
    for name, (*folders, _) in zip(images, parts, strict=True):
        split = SPLIT_NAMES.get(folders.pop(0).lower(), "") if has_split and folders else ""
        if has_split and not split:
            others.append(name)
        else:
            rows.append(Row(name, folders[0] if folders else "", split))
    if others:
        note(f"{path}: {len(others):,} other files are left out: {first_few(others)}")
    return rows
