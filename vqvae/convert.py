"""Tokenizers of taming-transformers, LlamaGen and diffusers: into a model folder, and back."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import addresses, cli, foreign
from utils.files import (
    TEMPORARY,
    check_size,
    check_unused,
    flush,
    read_json,
    read_tensors,
    replace_folder,
    sha256,
    write_folder,
)
from utils.provenance import Provenance, Stage
from utils.training import checkpoint
from vqvae import VQVAE
from vqvae.foreign_configs import READERS, write_diffusers, write_taming
from vqvae.layouts import LAYOUTS, from_other, to_other

DEFAULT_SIZE = (256, 256)  # what most of them were trained on
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.bin"
# Under which key which of them puts the weights; LlamaGen's own scripts prefer the average.
NEST = {"taming": "state_dict", "llamagen": "model"}
NESTS = ("ema", "model", "module", "state_dict")
YAML_BYTES = 1 << 18
# diffusers renamed its attention's parts; released files have the old names.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v."}
OLD_NAMES[".proj_attn."] = ".to_out.0."


def read_diffusers(folder: Path) -> dict[str, Tensor]:
    """The state dict in a diffusers folder, by the names of today.

    Raises:
        UserError: there is none.
    """
    if (folder / DIFFUSERS_WEIGHTS).exists() or not (folder / OLD_DIFFUSERS_WEIGHTS).exists():
        state = read_tensors(folder / DIFFUSERS_WEIGHTS)
    else:
        state = foreign.read_state_dict(folder / OLD_DIFFUSERS_WEIGHTS).tensors
    for old, new in OLD_NAMES.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def read_config(project: str, path: Path) -> dict[str, Any]:
    """The settings that another project's config file holds, JSON or YAML.

    Raises:
        UserError: no such file, one of something else, or a project without config files.
    """
    if project not in READERS:
        raise cli.UserError(
            f"{project} has no config files; leave out --config: the weights tell all but "
            "--image_size"
        )
    content = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    try:
        return READERS[project](content)
    except ValueError as error:
        raise cli.UserError(f"{path}: {error}") from error


def _import_yaml(path: Path) -> Any:
    try:
        import yaml  # comes with MLflow
    except ImportError as error:
        raise cli.UserError(f"{path} is YAML, which needs: pip install pyyaml") from error
    return yaml


def _read_yaml(path: Path) -> object:
    yaml = _import_yaml(path)
    try:
        check_size(path, YAML_BYTES)
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise cli.UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error


def bring_in(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint of another project into a model folder."""
    path, project = Path(arguments.checkpoint), arguments.source
    config_file, not_tensors = arguments.config, []
    if project == "diffusers":
        state = read_diffusers(path)
        config_file = config_file or path / "config.json"
    elif path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        nests = NESTS if project == "llamagen" else foreign.NESTS
        found = foreign.read_state_dict(path, nests)
        state = found.tensors
        print(f"read: {found.nest or 'all'}; not read: {cli.first_few(found.beside) or 'nothing'}")
        not_tensors = found.ignored
    settings = read_config(project, Path(config_file)) if config_file else {}
    image_size = settings.pop("image_size", DEFAULT_SIZE)
    try:
        model, ignored = from_other(project, state, arguments.image_size or image_size, settings)
    except ValueError as error:
        raise cli.UserError(f"{path}: {error}") from error
    if "quantize.used" in ignored:
        print("warning: the checkpoint's remap of used codes is ignored: indices are unmapped")
    ignored += not_tensors
    print(f"ignored, not part of the model: {cli.first_few(ignored) or 'nothing'}")
    inputs = {arguments.checkpoint: sha256(path)} if path.is_file() else {}
    origin = Provenance(lineage=(Stage.now("tokenizer", inputs, ""),))
    folder = Path(arguments.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, checkpoint.model_files(model, origin))
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    print(
        f"{folder}: {parameters:,} parameters, f{config.downsampling}"
        f", {config.codebook_size} codes of {config.codebook_dim} dimensions ({config.quantizer}), "
        f"images of {config.image_size[0]}x{config.image_size[1]}"
    )
    print(
        cli.next_command("quantize_dataset.py", "--model_dir", folder, "--path_to_data", "DATA.csv")
    )


def take_out(arguments: argparse.Namespace) -> None:
    """Convert a model folder into a checkpoint of another project."""
    loaded = checkpoint.load_model(addresses.fetch(arguments.checkpoint), VQVAE)
    try:
        state = to_other(arguments.target, loaded.model)
    except ValueError as error:
        raise cli.UserError(f"{loaded.folder}: {error}") from error
    folder = Path(arguments.output_dir)
    config, weights = loaded.model.config, f"{arguments.target}.ckpt"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if arguments.target == "diffusers":
        files = {"config.json": write_diffusers(config), DIFFUSERS_WEIGHTS: state}
        write_folder(folder, files)
    else:
        files = {weights: lambda path: torch.save({NEST[arguments.target]: state}, path)}
        if arguments.target == "taming":
            files["config.yaml"] = lambda path: _write_yaml(write_taming(config), path)
        _write_folder(folder, files)
    print(f"written: {folder}")


def _write_folder(folder: Path, files: dict[str, Callable[[Path], None]]) -> None:
    """Write a folder by what writes each of its files; whole or not at all."""
    staging = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        for name, write in files.items():
            write(staging / name)
            flush(staging / name)
        flush(staging)
    except (OSError, RuntimeError) as error:  # the latter is torch's for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        raise cli.UserError(f"cannot write {folder} ({error}); make room on the disk") from error
    replace_folder(staging, folder)
    flush(folder.parent)


def _write_yaml(content: dict[str, Any], path: Path) -> None:
    yaml = _import_yaml(path)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def main(arguments: argparse.Namespace) -> None:
    check_unused(Path(arguments.output_dir))
    if arguments.source:
        bring_in(arguments)
        return
    for name in ("config", "image_size"):
        if getattr(arguments, name):
            raise cli.UserError(f"--{name} does nothing with --to; leave it out")
    take_out(arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m vqvae.convert")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=tuple(LAYOUTS), help="project it comes from")
    way.add_argument("--to", dest="target", choices=tuple(LAYOUTS), help="project it goes to")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="--from: file, or folder of diffusers; --to: model folder, or runs:/...",
    )
    parser.add_argument(
        "--config",
        metavar="PATH",
        help="with --from: config file of the checkpoint (taming: .yaml; diffusers: the folder's), "
        "for image size, dropout and loss weights, which weights do not tell; the rest must agree",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write, not there yet")
    parser.add_argument(
        "--image_size",
        type=cli.height_and_width,
        metavar="H,W",
        help="of the data, with --from (default: as the config says, else 256)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
