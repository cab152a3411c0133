"""Model folders: config.json + model.safetensors, verified."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from utils.cli import UserError, one_line
from utils.files import check_links, intact_folder, read_json, read_tensors, sha256, typed, verify
from utils.provenance import CONFIG, LoadedModel, Provenance

WEIGHTS = "model.safetensors"
PROVENANCE = "provenance.json"


def model_files(model: nn.Module, provenance: Provenance) -> dict[str, dict[str, Any]]:
    """The files of a model folder, for `write_folder`."""
    if hasattr(model, "pretrained_config"):
        config = model.pretrained_config()
    else:
        config = {"model": type(model).__name__, **asdict(model.config)}
    return {CONFIG: config, WEIGHTS: model.state_dict(), PROVENANCE: asdict(provenance)}


def find_model_folder(path: str | Path) -> Path:
    """A model folder: `path` itself, or `best` in it where `path` is an output folder.

    Raises:
        UserError: neither is one.
    """
    path = Path(path)
    for folder in (path, intact_folder(path / "best")):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if not path.exists():
        raise UserError(
            f"no such model folder: {path}; give an output folder of a training, or "
            "runs:/<run id>/checkpoints"
        )
    raise UserError(f"{path} is no model folder: it has no {CONFIG} and {WEIGHTS}")


def load_model(
    path: str | Path, model_class: type, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Build the model that a model folder describes and fill in its weights.

    Args:
        path: a model folder, or an output folder whose `best` is one.
        model_class: the class of the model, whose constructor takes its config dataclass.
        device: where to put it.

    Raises:
        UserError: no model folder, another kind of model, or damaged files.
    """
    folder = find_model_folder(path)
    check_links(folder)
    for path in (folder / CONFIG, folder / PROVENANCE):
        verify(path)
    values = read_json(folder / CONFIG)
    if hasattr(model_class, "from_pretrained"):
        verify(folder / WEIGHTS)
        try:
            model = model_class.from_pretrained(folder, device)
        except (ValueError, OSError) as error:
            raise UserError(f"cannot read {folder}: {one_line(error, 300)}") from error
        return LoadedModel(model, sha256(folder / WEIGHTS), folder, read_provenance(folder))
    kind = values.pop("model", None)
    if kind != model_class.__name__:
        raise UserError(f"{folder} holds a {kind}, but a {model_class.__name__} is needed here")
    config_class = get_type_hints(model_class.__init__)["config"]
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
