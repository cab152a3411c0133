"""Provenance: the commands that produced a model, indices or an image, stored with each of them.

Model folders (config.json, model.safetensors, provenance.json) are read here, from any address.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.PngImagePlugin import PngImageFile, PngInfo

from utils import files
from utils.addresses import fetch, without_credentials
from utils.cli import Checked, UserError, command_line, user_error

ROOT = Path(__file__).resolve().parents[1]
PNG_KEY, SPLIT_KEY = "lineage", "split"
CONFIG, WEIGHTS, PROVENANCE = "config.json", "model.safetensors", "provenance.json"
LINEAGE = "lineage.json"  # in the output folder of a training and among its artifacts
JSON_ERRORS = (ValueError, TypeError, AttributeError, RecursionError, UserError)  # of damaged JSON


@dataclass(frozen=True)
class Stage:
    """One command of a lineage."""

    name: str  # tokenizer, indices, gpt, samples or images
    command: str  # as typed
    inputs: dict[str, str] = field(default_factory=dict)  # path or address as given -> SHA-256
    run_id: str = ""  # of the MLflow run that the command logged to
    commit: str = ""  # with a + if files were changed; "" outside a checkout
    torch: str = ""  # version
    threads: int = 0  # of PyTorch on the CPU; the last bits of a sum depend on their number
    processes: int = 1  # that torchrun started
    sha256: str = ""  # of the output; "" until a later stage has read it

    @classmethod
    def now(cls, name: str, inputs: Mapping[str, str], run_id: str) -> "Stage":
        """The running command, without passwords in addresses."""
        code = git_commit(), torch.__version__, torch.get_num_threads()
        processes = int(os.environ.get("WORLD_SIZE", 1))
        read = {without_credentials(path): digest for path, digest in inputs.items()}
        return cls(name, without_credentials(command_line()), read, run_id, *code, processes)


@dataclass(frozen=True)
class Split(Checked):
    """How a training split data whose CSV has no split column."""

    val_fraction: float = field(metadata={"min": 0, "max": 1})
    seed: int


Lineage = tuple[Stage, ...]  # in the order in which they were run


def git_commit() -> str:
    """The commit that is checked out, with a + if tracked files differ; "" outside of git."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):  # no git
        if (ROOT / ".git").exists():
            done = subprocess.run([*describe, "--dirty=+"], capture_output=True, text=True)
            return done.stdout.strip()
    return ""


def finished(lineage: Lineage, sha256: str) -> Lineage:
    """The lineage of an output, completed by the output's SHA-256."""
    return (*lineage[:-1], replace(lineage[-1], sha256=sha256)) if lineage else ()


def joined(*lineages: Lineage) -> Lineage:
    """All stages of several lineages, each once, inputs first."""
    return tuple({(s.name, s.command, s.sha256): s for one in lineages for s in one}.values())


def describe(lineage: Lineage) -> str:
    """The stages in order, as text: their commands, inputs and outputs, and code."""
    lines = []
    for number, stage in enumerate(lineage):
        lines.append(f"\n{number + 1}  {stage.name}" + f"  run {stage.run_id}" * bool(stage.run_id))
        lines.append(f"   $ {stage.command}")
        for path, digest in stage.inputs.items():
            made = next((n for n in range(number) if lineage[n].sha256 == digest), None)
            origin = "" if made is None else f"  (of {made + 1})"
            lines.append(f"   read   {digest[:12]}  {path}{origin}")
        lines.append(f"   wrote  {stage.sha256[:12] or 'pictures'}")
        code = f"commit {stage.commit[:12]}{stage.commit[40:]}" if stage.commit else "no commit"
        processes = f", {stage.processes} processes" * (stage.processes > 1)
        lines.append(f"   by     {code}, PyTorch {stage.torch}, {stage.threads} threads{processes}")
    return "\n".join(lines)


def to_json(lineage: Lineage, indent: int | None = None) -> str:
    """The text that `from_json` reads."""
    return json.dumps([asdict(stage) for stage in lineage], indent=indent)


def from_json(text: str, where: str) -> Lineage:
    """The lineage in a text that `to_json` wrote, or a UserError that names its place, `where`."""
    with user_error(f"the lineage of {where} is damaged: %s", *JSON_ERRORS):
        return tuple(files.typed(Stage, value) for value in json.loads(text))


@dataclass(frozen=True)
class Provenance:
    """The origin of a model: its MLflow run, the split of its data, its commands."""

    run_id: str = ""
    seed: int = 0
    val_fraction: float = 0.1
    lineage: Lineage = ()  # up to the command that trained it

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]*", self.run_id):  # folders are named after it
            raise ValueError(f"run_id is {self.run_id!r:.80}, which is not the id of an MLflow run")
        _ = self.split

    @property
    def split(self) -> Split:
        return Split(self.val_fraction, self.seed)


class LoadedModel(NamedTuple):
    """A model in eval mode, as it was read from a model folder."""

    model: Any  # of the class that was asked for
    sha256: str  # of its weights file
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


def model_files(model: Any, provenance: Provenance) -> files.Files:
    """The files of a model folder, for `write_folder`."""
    config, weights = model.pretrained_config(), model.pretrained_state()
    return {CONFIG: config, WEIGHTS: weights, PROVENANCE: asdict(provenance)}


def find_model_folder(path: Path) -> Path:
    """`path` itself, or `best` in it if it is the output folder of a training."""
    for folder in (path, files.intact_folder(path / "best")):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if not path.exists():
        raise UserError(
            f"no such model folder: {path}; give an output folder of a training, or "
            "runs:/<run id>/checkpoints"
        )
    raise UserError(f"{path} is not a model folder: it has no {CONFIG} and {WEIGHTS}")


def load_model(
    address: str | Path, model_class: Any, device: torch.device | str = "cpu"
) -> LoadedModel:
    """The model at an address, in eval mode: a model folder, or the `best` of an output folder.

    A UserError for no model folder, another kind of model, or damaged files.
    """
    folder = find_model_folder(fetch(str(address)))
    files.check_links(folder)
    files.check_size(folder / CONFIG, files.JSON_BYTES)
    for name in (CONFIG, WEIGHTS, PROVENANCE):
        files.verify(folder / name)
    with user_error(f"cannot read {folder}: %s", OSError, ValueError):
        model = model_class.from_pretrained(folder, device)
    return LoadedModel(model, files.sha256(folder / WEIGHTS), folder, read_provenance(folder))


def read_provenance(folder: Path) -> Provenance:
    """Where the model of a model folder comes from, as far as it is recorded."""
    path = folder / PROVENANCE
    with user_error(f"{path} is damaged: %s", UserError):
        return files.typed(Provenance, files.read_json(path) if path.is_file() else {})


def png_info(lineage: Lineage, split: Split) -> PngInfo:
    """The texts of a PNG file that state its origin: the lineage (compressed) and the split."""
    info = PngInfo()
    info.add_text(PNG_KEY, to_json(lineage), zip=True)
    info.add_text(SPLIT_KEY, json.dumps(asdict(split)))
    return info


def of_picture(path: Path) -> tuple[Lineage, Split | None]:
    """The lineage in a PNG file, () for none, and the split; its pixels are not decoded.

    A UserError if it is not a PNG file, or what it states is damaged.
    """
    text = f"{path} is not a readable PNG file: %s"
    with user_error(text, OSError, SyntaxError, ValueError), path.open("rb") as stream:
        texts = PngImageFile(stream).info
    with user_error(f"the split of the data in {path} is damaged: %s", *JSON_ERRORS):
        split = files.typed(Split, json.loads(texts[SPLIT_KEY])) if SPLIT_KEY in texts else None
    return from_json(texts.get(PNG_KEY, "[]"), str(path)), split
