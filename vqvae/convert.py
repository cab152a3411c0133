"""Tokenizers of taming-transformers, LlamaGen and diffusers: into a model folder, and back."""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from utils import cli, files, foreign
from utils.model_folder import load_model, model_files
from utils.provenance import Provenance, Stage
from vqvae import VQVAE, VQVAEConfig
from vqvae.formats import FORMATS, export_weights, import_weights

# Their names of settings of `VQVAEConfig`.
TAMING_NETWORK = {
    "in_channels": "in_channels",
    "channels": "ch",
    "channel_multipliers": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "z_channels",
}
TAMING_PARAMS = {"codebook_size": "n_embed", "codebook_dim": "embed_dim"}
DIFFUSERS = {
    "in_channels": "in_channels",
    "num_res_blocks": "layers_per_block",
    "mid_attention": "mid_block_add_attention",
    "z_channels": "latent_channels",
    "codebook_size": "num_vq_embeddings",
    "codebook_dim": "vq_embed_dim",
}
# Values without which a VQModel of diffusers is another network.
DIFFUSERS_FIXED: dict[str, object] = {"_class_name": "VQModel", "act_fn": "silu"}
DIFFUSERS_FIXED |= {"norm_num_groups": 32, "norm_type": "group"}
# Parameters that taming's classes require.
TAMING_LOSS = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
GUMBEL_TEMPERATURE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {
        "warm_up_steps": 0,
        "max_decay_steps": 1000001,
        "lr_start": 0.9,
        "lr_max": 0.9,
        "lr_min": 1e-6,
    },
}


def read_taming(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in taming's configs/*.yaml, of a tokenizer or of the GPT that holds it."""
    params = content["model"]["params"]
    params = params.get("first_stage_config", {}).get("params", params)
    network = params["ddconfig"]
    side, levels = network["resolution"], range(len(network["ch_mult"]))
    settings = {
        **{ours: network[theirs] for ours, theirs in TAMING_NETWORK.items()},
        **{ours: params[theirs] for ours, theirs in TAMING_PARAMS.items()},
        "image_size": (side, side),
        "channel_multipliers": tuple(network["ch_mult"]),
        "attention_levels": tuple(i for i in levels if side >> i in network["attn_resolutions"]),
        "dropout": float(network.get("dropout", 0.0)),
    }
    if "kl_weight" in params:
        settings |= {"quantizer": "gumbel", "entropy_weight": float(params["kl_weight"])}
    return settings


def write_taming(config: VQVAEConfig) -> dict[str, Any]:
    """The content of taming's configs/*.yaml for a tokenizer, without losses and data."""
    assert config.image_size is not None
    side = max(config.image_size)  # it has squares only
    network = {theirs: getattr(config, ours) for ours, theirs in TAMING_NETWORK.items()}
    network |= {
        "ch_mult": list(config.channel_multipliers),
        "double_z": False,
        "resolution": side,
        "out_ch": config.in_channels,
        "attn_resolutions": [side >> level for level in config.attention_levels],
        "dropout": config.dropout,
    }
    params = {theirs: getattr(config, ours) for ours, theirs in TAMING_PARAMS.items()}
    params |= {"ddconfig": network, "lossconfig": TAMING_LOSS}
    if config.quantizer == "gumbel":
        params["kl_weight"] = config.to_dict()["entropy_weight"]
        params["temperature_scheduler_config"] = GUMBEL_TEMPERATURE
    name = {"gumbel": "GumbelVQ", "ema": "EMAVQ"}.get(config.quantizer, "VQModel")
    return {"model": {"target": f"taming.models.vqgan.{name}", "params": params}}


def read_diffusers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the config.json of a diffusers `VQModel`; absent ones are left out."""
    for name, needed in DIFFUSERS_FIXED.items():
        if content.get(name, needed) != needed:
            raise ValueError(f"{name} is {content[name]!r}, but only {needed!r} can be read")
    size = content.get("sample_size", 256)
    height, width = (size, size) if isinstance(size, int) else size
    settings: dict[str, Any] = {"image_size": (int(height), int(width))}
    for ours, theirs in DIFFUSERS.items():
        if content.get(theirs) is not None:
            settings[ours] = content[theirs]
    if widths := content.get("block_out_channels"):
        settings["channels"] = widths[0]
        settings["channel_multipliers"] = tuple(width // widths[0] for width in widths)
    if kinds := content.get("down_block_types"):
        levels = (i for i, kind in enumerate(kinds) if kind.startswith("Attn"))
        settings["attention_levels"] = tuple(levels)
    return settings


def write_diffusers(config: VQVAEConfig) -> dict[str, Any]:
    """The content of the config.json of a diffusers `VQModel`."""
    assert config.image_size is not None
    levels = range(len(config.channel_multipliers))
    attention = ["Attn" if level in config.attention_levels else "" for level in levels]
    return DIFFUSERS_FIXED | {
        **{theirs: getattr(config, ours) for ours, theirs in DIFFUSERS.items()},
        "block_out_channels": [config.channels * m for m in config.channel_multipliers],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
        "out_channels": config.in_channels,
        "sample_size": config.image_size[0],  # an integer there
    }


CONFIG_READERS = {"taming": read_taming, "diffusers": read_diffusers}
CONFIG_BYTES = 1 << 18


def read_config(project: str, path: Path) -> dict[str, Any]:
    """The settings in another project's config file, JSON or YAML.

    Raises:
        UserError: no such file, one of something else, or a project without config files.
    """
    if project not in CONFIG_READERS:
        raise cli.UserError(
            f"{project} has no config files; leave out --config: all settings but --image_size "
            "follow from the weights"
        )
    import yaml  # comes with MLflow

    try:
        files.check_size(path, CONFIG_BYTES)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise cli.UserError(f"cannot read {path}: {cli.one_line(error)}") from error
    try:
        return CONFIG_READERS[project](content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise cli.UserError(
            f"{path} is not the config of a {project} tokenizer: {error!r:.200}"
        ) from error


# --- the script -----------------------------------------------------------------------------------

DEFAULT_SIZE = (256, 256)  # of the images that most of them were trained on
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.bin"
# diffusers renamed the parts of its attention; released files have the old names.
OLD_DIFFUSERS_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_diffusers_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict in a diffusers folder, under the keys of today.

    Raises:
        UserError: there is none.
    """
    if (folder / DIFFUSERS_WEIGHTS).exists() or not (folder / OLD_DIFFUSERS_WEIGHTS).exists():
        state = files.read_tensors(folder / DIFFUSERS_WEIGHTS)
    else:
        state = foreign.read_state_dict(folder / OLD_DIFFUSERS_WEIGHTS).tensors
    for old, new in OLD_DIFFUSERS_KEYS.items():
        state = {key.replace(f".{old}.", f".{new}."): value for key, value in state.items()}
    return state


def import_checkpoint(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint of another project to a model folder."""
    path, project = Path(arguments.checkpoint), arguments.source
    config_file, not_tensors = arguments.config, []
    if project == "diffusers":
        state = read_diffusers_weights(path)
        config_file = config_file or path / "config.json"
    elif path.suffix == ".safetensors":
        state = files.read_tensors(path)
    else:
        found = foreign.read_state_dict(path, FORMATS[project].nests)
        state, not_tensors = found.tensors, found.ignored
        print(f"read: {found.nest or 'all'}; not read: {cli.first_few(found.beside) or 'nothing'}")
    settings = read_config(project, Path(config_file)) if config_file else {}
    size = settings.pop("image_size", DEFAULT_SIZE)
    size = arguments.image_size or size
    try:
        model, ignored = import_weights(project, state, size, settings)
    except ValueError as error:
        raise cli.UserError(f"{path}: {error}") from error
    if "quantize.used" in ignored:
        print("warning: the checkpoint's remap of used codes is ignored: indices are unmapped")
    ignored += not_tensors
    print(f"ignored, not part of the model: {cli.first_few(ignored) or 'nothing'}")
    inputs = {arguments.checkpoint: files.sha256(path)} if path.is_file() else {}
    origin = Provenance(lineage=(Stage.now("tokenizer", inputs, ""),))
    folder = Path(arguments.output_dir)
    files.write_folder(folder, model_files(model, origin))
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    print(
        f"{folder}: {parameters:,} parameters, f{config.downsampling}, "
        f"{config.codebook_size} codes of {config.codebook_dim} dimensions ({config.quantizer}), "
        f"images of {size[0]}x{size[1]}"
    )
    print(
        cli.next_command("quantize_dataset.py", "--model_dir", folder, "--path_to_data", "DATA.csv")
    )


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Convert a model folder to a checkpoint of another project."""
    project, folder = arguments.target, Path(arguments.output_dir)
    loaded = load_model(arguments.checkpoint, VQVAE)
    config = loaded.model.config
    try:
        state = export_weights(project, loaded.model)
    except ValueError as error:
        raise cli.UserError(f"{loaded.folder}: {error}") from error
    if project == "diffusers":
        files.write_folder(
            folder, {"config.json": write_diffusers(config), DIFFUSERS_WEIGHTS: state}
        )
    else:
        settings = write_taming(config) if project == "taming" else None
        _write_checkpoint(folder, f"{project}.ckpt", {FORMATS[project].nest: state}, settings)
    print(f"written: {folder}")


def _write_checkpoint(
    folder: Path, name: str, content: dict[str, Any], settings: dict[str, Any] | None
) -> None:
    """Write a file of torch.save and a config.yaml into a new folder, or nothing."""
    staging = folder.with_name(folder.name + files.TEMPORARY)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        torch.save(content, staging / name)
        if settings is not None:
            import yaml  # comes with MLflow

            text = yaml.safe_dump(settings, sort_keys=False)
            (staging / "config.yaml").write_text(text, encoding="utf-8")
        staging.rename(folder)
    except (OSError, RuntimeError) as error:  # the latter is torch's for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        raise cli.UserError(f"cannot write {folder} ({error}); free space on the disk") from error


def main(arguments: argparse.Namespace) -> None:
    files.check_unused(Path(arguments.output_dir))
    if arguments.source:
        import_checkpoint(arguments)
        return
    for name in ("config", "image_size"):
        if getattr(arguments, name):
            raise cli.UserError(f"--{name} has no effect with --to; leave it out")
    export_checkpoint(arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m vqvae.convert")
    direction = parser.add_mutually_exclusive_group(required=True)
    names = tuple(FORMATS)
    direction.add_argument("--from", dest="source", choices=names, help="project to import from")
    direction.add_argument("--to", dest="target", choices=names, help="project to export to")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="--from: file, or folder of diffusers; --to: model folder, or runs:/...",
    )
    parser.add_argument(
        "--config",
        metavar="PATH",
        help="--from: config file of the checkpoint (taming: .yaml; diffusers: the folder's), for "
        "image size, dropout and loss weights, which do not show in the weights; the rest must "
        "agree",
    )
    parser.add_argument("--output_dir", required=True, help="new folder to write")
    parser.add_argument(
        "--image_size",
        type=cli.height_and_width,
        metavar="H,W",
        help="--from: size of the data (default: that of --config, else 256)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
