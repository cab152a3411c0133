"""Model folders: config.json + model.safetensors + provenance.json, read from any address."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from utils import files
from utils.addresses import fetch
from utils.cli import UserError, one_line
from utils.provenance import CONFIG, LoadedModel, Provenance

WEIGHTS, PROVENANCE = "model.safetensors", "provenance.json"


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
    try:
        model = model_class.from_pretrained(folder, device)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder}: {one_line(error, limit=400)}") from error
    return LoadedModel(model, files.sha256(folder / WEIGHTS), folder, read_provenance(folder))


def read_provenance(folder: Path) -> Provenance:
    """Where the model of a model folder comes from, as far as it is recorded."""
    path = folder / PROVENANCE
    try:
        return files.typed(Provenance, files.read_json(path) if path.is_file() else {})
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error
