"""Model folders: config.json + model.safetensors + provenance.json, read from any address."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from utils.addresses import fetch
from utils.cli import UserError, one_line
from utils.files import (
    Files,
    check_links,
    intact_folder,
    read_json,
    read_tensors,
    sha256,
    typed,
    verify,
)
from utils.provenance import CONFIG, LoadedModel, Provenance

WEIGHTS, PROVENANCE = "model.safetensors", "provenance.json"


def model_files(model: Any, provenance: Provenance) -> Files:
    """The files of a model folder, for `write_folder`."""
    if hasattr(model, "pretrained_config"):
        config = model.pretrained_config()
    else:
        config = {"model": type(model).__name__, **asdict(model.config)}
    return {CONFIG: config, WEIGHTS: model.state_dict(), PROVENANCE: asdict(provenance)}


def find_model_folder(path: Path) -> Path:
    """`path` itself, or `best` in it if it is the output folder of a training."""
    for folder in (path, intact_folder(path / "best")):
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
    check_links(folder)
    for name in (CONFIG, WEIGHTS, PROVENANCE):
        verify(folder / name)
    try:
        if hasattr(model_class, "from_pretrained"):
            model = model_class.from_pretrained(folder, device)
        else:
            model = _build(folder, model_class).eval().to(device)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error, limit=400)) from error
    return LoadedModel(model, sha256(folder / WEIGHTS), folder, read_provenance(folder))


def read_provenance(folder: Path) -> Provenance:
    """Where the model of a model folder comes from, as far as it is recorded."""
    path = folder / PROVENANCE
    try:
        return typed(Provenance, read_json(path) if path.is_file() else {})
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _build(folder: Path, model_class: Any) -> nn.Module:
    values = read_json(folder / CONFIG)
    kind = values.pop("model", None)
    if kind != model_class.__name__:
        raise UserError(f"{folder} holds a {kind}, but a {model_class.__name__} is needed here")
    try:
        config = typed(get_type_hints(model_class.__init__)["config"], values)
    except UserError as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}") from error
    tensors = read_tensors(folder / WEIGHTS)
    try:
        with torch.device("meta"):  # a config may describe a network of any size
            _check_kinds(model_class(config).state_dict(), tensors)
        model = model_class(config)
        model.load_state_dict(tensors)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{folder}: {CONFIG} and {WEIGHTS} do not fit together: {one_line(error)}"
        ) from error
    return model


def _check_kinds(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    if odd := sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"{odd[0]:.80} is only in one of them")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ValueError(f"{name} is {list(found[name].shape)} and not {list(tensor.shape)}")
        if tensor.is_floating_point() != found[name].is_floating_point():
            raise ValueError(f"{name} is {found[name].dtype} and not {tensor.dtype}")
