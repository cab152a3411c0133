"""Model folders: config.json + model.safetensors, written whole or not at all, and verified."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils.cli import UserError, build
from utils.provenance import Lineage, finished, parse

WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "sha256.json"
PROVENANCE = "provenance.json"


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
    """
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
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
    sums = {name: sha256(staging / name) for name in files}
    (staging / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
    for path in (*staging.iterdir(), staging):
        _flush(path)
    swap_in(staging, folder)
    _flush(folder.parent)


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


def _flush(path: Path) -> None:
    """Make sure that a file or a folder's list of names has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        UserError: no such file, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
        if expected is not None and expected != sha256(path):
            raise UserError(
                f"{path} is damaged: its SHA-256 is not that in {CHECKSUMS}; copy it again"
            )


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
        raise UserError(f"no such model folder: {path}")
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
    verify(folder / CONFIG)
    values = read_json(folder / CONFIG)
    kind = values.pop("model", None)
    if kind != model_class.__name__:
        raise UserError(f"{folder} holds a {kind}, but a {model_class.__name__} is needed here")
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    try:
        model = model_class(_build_config(config_class, values, folder))
        model.load_state_dict(read_tensors(folder / WEIGHTS))
    except (TypeError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: {CONFIG} and {WEIGHTS} do not fit together: {line}") from error
    return LoadedModel(
        model.eval().to(device), sha256(folder / WEIGHTS), folder, read_provenance(folder)
    )


def read_provenance(folder: Path) -> Provenance:
    """Where the model of a model folder comes from, as far as it says.

    Raises:
        UserError: the file is damaged.
    """
    if not (folder / PROVENANCE).is_file():
        return Provenance()
    values = read_json(folder / PROVENANCE)
    values.pop("command", None)  # of folders from before there was a lineage
    try:
        return Provenance(**values | {"lineage": parse(values.get("lineage", ()))})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / PROVENANCE} is damaged: {error}") from error


def _build_config(config_class: type, values: dict[str, Any], folder: Path) -> Any:
    try:
        return build(config_class, **values)
    except UserError as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}") from error
