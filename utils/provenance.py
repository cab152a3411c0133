"""Provenance: the commands that produced a model, indices or an image, stored with each of them."""

import functools
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.PngImagePlugin import PngImageFile, PngInfo

from utils.cli import UserError, command_line, one_line
from utils.files import typed

ROOT = Path(__file__).resolve().parents[1]
PNG_KEY, SPLIT_KEY = "lineage", "split"
CONFIG = "config.json"  # of a model folder


@dataclass(frozen=True)
class Stage:
    """One command of a lineage.

    Attributes:
        name: tokenizer, indices, gpt, samples or images.
        command: the command line as typed.
        inputs: the SHA-256 of each input, by its path or address as given.
        run_id: the MLflow run that the command logged to, or "".
        commit: the git commit, with a + if files were changed; "" outside a checkout.
        torch: version of PyTorch.
        threads: CPU threads of PyTorch; the last bits of a sum depend on their number.
        processes: number of processes that torchrun started.
        sha256: of the output; "" until a later stage has read it.
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
        """The running command."""
        code = git_commit(), torch.__version__, torch.get_num_threads()
        processes = int(os.environ.get("WORLD_SIZE", 1))
        return cls(name, command_line(), dict(inputs), run_id, *code, processes)


class Split(NamedTuple):
    """How a training split data whose CSV has no split column."""

    val_fraction: float
    seed: int


Lineage = tuple[Stage, ...]  # in the order in which they were run


@functools.cache
def git_commit() -> str:
    """The commit that is checked out, with a + if tracked files differ; "" outside of git."""
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
    """The lineage of an output, completed by the output's SHA-256."""
    return (*lineage[:-1], replace(lineage[-1], sha256=sha256)) if lineage else ()


def joined(*lineages: Lineage) -> Lineage:
    """All stages of several lineages, each once, inputs first."""
    return tuple({(s.name, s.command, s.sha256): s for one in lineages for s in one}.values())


def to_json(lineage: Lineage, indent: int | None = None) -> str:
    """The text that `from_json` reads."""
    return json.dumps([asdict(stage) for stage in lineage], indent=indent)


def from_json(text: str, where: str) -> Lineage:
    """The lineage in a text that `to_json` wrote; `where` names its place in messages.

    Raises:
        UserError: the text holds no lineage.
    """
    try:
        return tuple(typed(Stage, value) for value in json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"the lineage of {where} is damaged: {one_line(error)}") from error


@dataclass(frozen=True)
class Provenance:
    """The origin of a model.

    Attributes:
        run_id: the MLflow run that trained it, or "".
        seed, val_fraction: of the split of its data.
        lineage: the commands up to the one that trained it.
    """

    run_id: str = ""
    seed: int = 0
    val_fraction: float = 0.1
    lineage: Lineage = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]*", self.run_id):  # folders are named after it
            raise ValueError(f"run_id is {self.run_id!r:.80}, which is not the id of an MLflow run")
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
    """The texts of a PNG file that state its origin: the lineage (compressed) and the split."""
    info = PngInfo()
    info.add_text(PNG_KEY, to_json(lineage), zip=True)
    info.add_text(SPLIT_KEY, json.dumps(split._asdict()))
    return info


def of_picture(path: Path) -> Lineage:
    """The lineage in a PNG file; () if it has none.

    Raises:
        UserError: it is not a PNG file, or its lineage is damaged.
    """
    return from_json(_png_text(path, PNG_KEY) or "[]", str(path))


def split_of_picture(path: Path) -> Split | None:
    """The split in a PNG file; None if it has none.

    Raises:
        UserError: it is not a PNG file, or its split is damaged.
    """
    text = _png_text(path, SPLIT_KEY)
    try:
        split = Split(**json.loads(text)) if text else None
        if split and (type(split.seed) is not int or not 0 <= split.val_fraction <= 1):
            raise ValueError(f"got {split}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the split of the data in {path} is damaged: {error}") from error
    return split


def _png_text(path: Path, key: str) -> str:
    """A text before the pixels of a PNG file, which are not decoded; "" if there is none."""
    try:
        with path.open("rb") as stream:
            return str(PngImageFile(stream).info.get(key, ""))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable PNG file: {one_line(error)}") from error


def data_set_name(path: str) -> str:
    """The name of a CSV's data set: its file name, or its folder's if the file name is generic."""
    file = Path(path)
    general = ("data", "train", "images", "index", "indices", "list", "metadata")
    return file.stem if file.stem not in general else file.resolve().parent.name
