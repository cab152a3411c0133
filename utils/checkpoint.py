"""Model folders: config.json + model.safetensors, written whole or not at all, and verified."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils.cli import UserError, one_line
from utils.provenance import Lineage, finished
from utils.untrusted import JSON_BYTES, check_links, check_size, typed

WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "sha256.json"
PROVENANCE = "provenance.json"
TEMPORARY = ".tmp"  # ends the name of a folder that is being written


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


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write a folder that exists whole or not at all, also after a crash or a lost machine.

    Args:
        folder: where to; takes the place of what is there.
        files: contents by name: state dicts for *.safetensors, plain values for *.json.

    Raises:
        UserError: the disk is full; what was there before still is.
    """
    swap_in(_stage(folder, files), folder)
    flush(folder.parent)


def check_unused(folder: Path) -> None:
    """Refuse to write where something is already.

    Raises:
        UserError: it is a file, or a folder that is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another --output_dir, or move it away")


def write_new_folder(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """`write_folder` where nothing is yet."""
    _stage(folder, files).rename(folder)
    flush(folder.parent)


def _stage(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """The files on the disk in a temporary folder, the manifest of their SHA-256 last."""
    staging = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _check_space(staging, files)
        for name, content in files.items():
            if name.endswith(".safetensors"):
                # safetensors stores row-major only; clones keep tied weights and views apart.
                tensors = {
                    key: value.detach().to("cpu", copy=True).contiguous()
                    for key, value in content.items()
                }
                safetensors.torch.save_file(tensors, staging / name)
            else:
                (staging / name).write_text(json.dumps(content, indent=2) + "\n")
            flush(staging / name)
        sums = {name: sha256(staging / name) for name in files}
        (staging / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
        flush(staging / CHECKSUMS)
        flush(staging)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"cannot write {folder} ({error}); what was saved before is whole: make room on the "
            "disk, then --resume"
        ) from error
    return staging


def _check_space(staging: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise an OSError where the tensors would not fit on the disk."""
    needed = 1 << 20  # for names and numbers
    for name, content in files.items():
        if name.endswith(".safetensors"):
            needed += sum(value.nbytes for value in content.values())
    free = shutil.disk_usage(staging).free
    if free < needed:
        raise OSError(f"it takes {needed / 2**20:,.0f} MiB, but {free / 2**20:,.0f} are free")


def swap_in(staging: Path, folder: Path) -> None:
    """Put a finished folder in the place of another, of which nothing is ever half there."""
    old = _old_name(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def whole(folder: Path) -> Path:
    """`folder`, or what it was if a crash hit `swap_in` between its renames."""
    old = _old_name(folder)
    return old if not folder.exists() and old.exists() else folder


def _old_name(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def flush(path: Path) -> None:
    """Make sure that a file or a folder's list of names has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of at most 64 MiB.

    Raises:
        UserError: no such file, or no JSON object.
    """
    try:
        check_size(path, JSON_BYTES)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def verify(path: Path) -> None:
    """Check a file against the SHA-256 that its folder holds, where it does.

    Raises:
        UserError: the file is another than was written.
    """
    if (path.parent / CHECKSUMS).is_file():
        expected = read_json(path.parent / CHECKSUMS).get(path.name)
        try:
            found = expected and sha256(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from error
        if found != expected:
            raise UserError(
                f"{path} is damaged: its SHA-256 is not that in {CHECKSUMS}; copy it again - or, "
                f"if you changed it on purpose, take its line out of {CHECKSUMS}"
            )


def is_whole(folder: Path) -> bool:
    """Whether all files that a folder was written with are there, unchanged."""
    try:
        sums = read_json(folder / CHECKSUMS)
        return all(sha256(folder / name) == sums[name] for name in sums)
    except (OSError, ValueError, UserError):
        return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, verified.

    Raises:
        UserError: no such file, or a damaged one.
    """
    try:
        verify(path)
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def model_files(model: nn.Module, provenance: Provenance) -> dict[str, dict[str, Any]]:
    """The files of a model folder, for `write_folder`; `model.config` is a dataclass."""
    config = {"model": type(model).__name__, **asdict(model.config)}
    return {CONFIG: config, WEIGHTS: model.state_dict(), PROVENANCE: asdict(provenance)}


def find_model_folder(path: str | Path) -> Path:
    """A model folder: `path` itself, or `best` in it where `path` is an output folder.

    Raises:
        UserError: neither is one.
    """
    path = Path(path)
    for folder in (path, whole(path / "best")):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if not path.exists():
        raise UserError(
            f"no such model folder: {path}; give an output folder of a training, or "
            "runs:/<run id>/checkpoints"
        )
    raise UserError(f"{path} is no model folder: it has no {CONFIG} and {WEIGHTS}")


def load_model(
    path: str | Path, model_class: type, config_class: type, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Build the model that a model folder describes and fill in its weights.

    Args:
        path: a model folder, or an output folder whose `best` is one.
        model_class, config_class: what must be in it.
        device: where to put it.

    Raises:
        UserError: no model folder, another kind of model, or damaged files.
    """
    folder = find_model_folder(path)
    check_links(folder)
    for path in (folder / CONFIG, folder / PROVENANCE):
        verify(path)
    values = read_json(folder / CONFIG)
    kind = values.pop("model", None)
    if kind != model_class.__name__:
        raise UserError(f"{folder} holds a {kind}, but a {model_class.__name__} is needed here")
    config = _read_typed(config_class, values, folder / CONFIG)
    provenance = read_provenance(folder)
    tensors = read_tensors(folder / WEIGHTS)
    try:
        # First without memory for the weights: a config may ask for any size.
        with torch.device("meta"):
            _check_kinds(model_class(config).state_dict(), tensors)
        model = model_class(config)
        model.load_state_dict(tensors)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{folder}: {CONFIG} and {WEIGHTS} do not fit together: {one_line(error)}"
        ) from error
    return LoadedModel(model.eval().to(device), sha256(folder / WEIGHTS), folder, provenance)


def read_provenance(folder: Path) -> Provenance:
    """Where the model of a model folder comes from, as far as it says.

    Raises:
        UserError: the file is damaged.
    """
    written = folder / PROVENANCE
    values = read_json(written) if written.is_file() else {}
    return _read_typed(Provenance, values, written)


def _read_typed(make: type, values: dict[str, Any], path: Path) -> Any:
    try:
        return typed(make, values)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _check_kinds(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise a ValueError if tensors are missing, left over, or of another shape or kind."""
    if odd := sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"{odd[0]:.80} is only in one of them")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ValueError(f"{name} is {list(found[name].shape)} and not {list(tensor.shape)}")
        if tensor.is_floating_point() != found[name].is_floating_point():
            raise ValueError(f"{name} is {found[name].dtype} and not {tensor.dtype}")
