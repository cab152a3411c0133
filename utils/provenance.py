"""Where things come from: the commands that led to them, kept with each of them."""

import functools
import json
import os
import re
import subprocess
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.cli import UserError, command_line
from utils.data import decoding
from utils.data.decoding import complaint, open_image

ROOT = Path(__file__).resolve().parents[1]
PNG_KEY, SPLIT_KEY = "lineage", "split"
CONFIG = "config.json"  # of a model folder
MAX_PIXELS = 4 * decoding.MAX_PIXELS  # of a picture, which may be a grid of a hundred large ones


@dataclass(frozen=True)
class Stage:
    """One command of a lineage.

    Attributes:
        name: tokenizer, indices, gpt, samples or images.
        command: as it was typed.
        inputs: the SHA-256 of what it read, by the path or address that was given.
        run_id: the MLflow run that it was logged to, or "".
        commit: of git, with a + where files were changed; "" outside a checkout.
        torch: its version.
        threads: of PyTorch on a CPU; the last bits of a sum depend on them.
        processes: that torchrun started.
        sha256: of what it wrote, "" until somebody has read that.
    """

    name: str
    command: str
    inputs: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    commit: str = ""
    torch: str = ""
    threads: int = 0
    processes: int = 1
    sha256: str = ""

    @classmethod
    def now(cls, name: str, inputs: Mapping[str, str], run_id: str) -> "Stage":
        """The command that is running."""
        return cls(
            name,
            command_line(),
            dict(inputs),
            run_id,
            git_commit(),
            torch.__version__,
            torch.get_num_threads(),
            int(os.environ.get("WORLD_SIZE", 1)),
        )


class Split(NamedTuple):
    """How a training split its data, where the CSV did not: see `utils.data.table.split_rows`."""

    val_fraction: float
    seed: int


Lineage = tuple[Stage, ...]  # in the order in which they were run


@functools.cache
def git_commit() -> str:
    """The commit that is checked out, with a + where tracked files differ; "" outside of git."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        answers = [
            subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout without a commit
        return ""
    commit, changes = (answer.stdout.strip() for answer in answers)
    return commit + ("+" if changes else "")


def finished(lineage: Lineage, sha256: str) -> Lineage:
    """The lineage of something whose SHA-256 is known by now."""
    return (*lineage[:-1], replace(lineage[-1], sha256=sha256)) if lineage else ()


def joined(*lineages: Lineage) -> Lineage:
    """All stages of several lineages, each once, none before what it needs."""
    return tuple({(s.name, s.command, s.sha256): s for one in lineages for s in one}.values())


def content(lineage: Lineage) -> list[dict[str, Any]]:
    """What JSON files hold of it."""
    return [asdict(stage) for stage in lineage]


def parse(values: Iterable[Mapping[str, Any]]) -> Lineage:
    """Undo `content`.

    Raises:
        ValueError: it is something else.
    """
    try:
        lineage = tuple(Stage(**value) for value in values)
    except TypeError as error:
        raise ValueError(f"no lineage: {error}") from error
    for stage in lineage:
        for key, kind in typing.get_type_hints(Stage).items():
            if not isinstance(getattr(stage, key), typing.get_origin(kind) or kind):
                raise ValueError(f"no lineage: {key} is {getattr(stage, key)!r}")
        if not all(isinstance(value, str) for value in stage.inputs.values()):
            raise ValueError(f"no lineage: inputs are {stage.inputs!r:.80}")
    return lineage


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        run_id: the MLflow run that trained it, or "".
        seed, val_fraction: of the split of its data.
        lineage: the commands up to the one that made it.
    """

    run_id: str = ""
    seed: int = 0
    val_fraction: float = 0.1
    lineage: Lineage = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]*", self.run_id):  # folders are named after it
            raise ValueError(f"run_id is {self.run_id!r:.80}, which no MLflow run is called")
        if not 0 <= self.val_fraction <= 1:
            raise ValueError(f"val_fraction must be in [0, 1], got {self.val_fraction}")


class LoadedModel(NamedTuple):
    """A model in eval mode, as it was read.

    Attributes:
        model: of the class that was asked for.
        sha256: of its weights file.
        folder: its model folder.
        provenance: where it comes from.
    """

    model: Any
    sha256: str
    folder: Path
    provenance: Provenance

    @property
    def lineage(self) -> Lineage:
        """The commands that led to the model."""
        return finished(self.provenance.lineage, self.sha256)

    @property
    def home(self) -> Path:
        """Where things made with the model are put: beside its folder, or under outputs/."""
        if self.folder.name == "best" and (self.folder.parent / CONFIG).is_file():
            return self.folder.parent
        return Path("outputs") / (self.provenance.run_id or self.folder.name)


def png_info(lineage: Lineage, split: Split) -> PngInfo:
    """What a PNG file carries of where it comes from: two texts, the lineage compressed."""
    info = PngInfo()
    info.add_text(PNG_KEY, json.dumps(content(lineage)), zip=True)
    info.add_text(SPLIT_KEY, json.dumps(split._asdict()))
    return info


def of_picture(path: Path) -> Lineage:
    """The lineage that `png_info` put into a picture; () for a picture without.

    Raises:
        UserError: it is no picture, or says something else.
    """
    return of_json(_text(path, PNG_KEY) or "[]", str(path))


def split_of_picture(path: Path) -> Split | None:
    """The split that `png_info` put into a picture; None for a picture without.

    Raises:
        UserError: it is no picture, or says something else.
    """
    text = _text(path, SPLIT_KEY)
    if not text:
        return None
    try:
        split = Split(**json.loads(text))
        if type(split.seed) is not int or not 0 <= split.val_fraction <= 1:
            raise ValueError(f"it is {split}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the split of the data in {path} is damaged: {error}") from error
    return split


def _text(path: Path, key: str) -> str:
    """A text before the pixels of a PNG file, which are not decoded; "" where there is none.

    Raises:
        UserError: no picture.
    """
    try:
        with open_image(path, MAX_PIXELS) as picture:
            return str(picture.info.get(key, ""))
    except Exception as error:  # Pillow raises nearly everything on damaged files
        what = complaint(str(path), error)
        if isinstance(error, Image.DecompressionBombError):
            what = f"its header says more than {MAX_PIXELS:,} pixels"
        raise UserError(f"{path} is no picture that can be read: {what}") from error


def of_json(text: str, where: str) -> Lineage:
    """The lineage in a text.

    Raises:
        UserError: it holds none.
    """
    try:
        return parse(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the lineage of {where} is damaged: {error}") from error


def data_set_name(path: str) -> str:
    """What to call the data set of a CSV: by the file, or by its folder if that says nothing."""
    path = Path(path)
    general = ("data", "train", "images", "index", "indices", "list", "metadata")
    return path.stem if path.stem not in general else path.resolve().parent.name
