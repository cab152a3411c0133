"""Tokenizers of taming-transformers, LlamaGen and diffusers: into a model folder, and back."""

import argparse
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import cli, files, foreign
from utils.provenance import Provenance, Stage, load_model, model_files
from vqvae import VQVAE, VQVAEConfig, formats
from vqvae.formats import FIRST_KEY, FORMATS

# Parameters that taming's classes require.
WARM_UP = {"warm_up_steps": 0, "max_decay_steps": 1000001, "lr_start": 0.9, "lr_max": 0.9}
GUMBEL_TEMPERATURE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": WARM_UP | {"lr_min": 1e-6},
}
CONFIG_BYTES = 1 << 18
DEFAULT_SAMPLE_SIZE = 32
LIGHTNING = {"class_path": "target", "init_args": "params"}  # names in SEED-Voken's configs
NOT_COMPARED = ("kl_weight", "lossconfig", "temperature_scheduler_config", "sample_size")


def write_taming(config: VQVAEConfig) -> dict[str, Any]:
    """The parameters of a tokenizer in taming's configs/*.yaml."""
    side = max(config.image_size)  # it has squares only
    params: dict[str, Any] = {
        "embed_dim": config.codebook_dim,
        "n_embed": config.codebook_size,
        "ddconfig": {
            "double_z": False,
            "z_channels": config.z_channels,
            "resolution": side,
            "in_channels": config.in_channels,
            "out_ch": config.in_channels,
            "ch": config.channels,
            "ch_mult": list(config.channel_multipliers),
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": [side >> level for level in config.attention_levels],
            "dropout": config.dropout,
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
    }
    if config.quantizer == "gumbel":
        params["kl_weight"] = config.to_dict()["entropy_weight"]
        params["temperature_scheduler_config"] = GUMBEL_TEMPERATURE
    return params


def read_taming(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of a tokenizer, or of the one in a GPT's config; and what weights lack."""
    model = {LIGHTNING.get(name, name): value for name, value in content["model"].items()}
    model = model["params"].get("first_stage_config", model)
    params = model["params"]
    network, loss = params["ddconfig"], params.get("lossconfig", {}).get("params", {})
    side, levels = network["resolution"], range(len(network["ch_mult"]))
    occurring = [side >> i for i in levels if side >> i in network["attn_resolutions"]]
    settings = {"image_size": (side, side), "dropout": float(network.get("dropout", 0.0))}
    if "kl_weight" in params:
        settings |= {"quantizer": "gumbel", "entropy_weight": float(params["kl_weight"])}
    elif str(model.get("target")).endswith(".IBQ"):  # l2_normalize has no effect there
        settings["quantizer"] = "ibq"
        if "entropy_loss_weight" in loss:
            used = params.get("use_entropy_loss", False)
            settings["entropy_weight"] = float(used and loss["entropy_loss_weight"])
    elif params.get("l2_normalize"):
        raise cli.UserError("l2_normalize is not supported: codes are decoded with their lengths")
    return params | {"ddconfig": network | {"attn_resolutions": occurring}}, settings


def write_diffusers(config: VQVAEConfig) -> dict[str, Any]:
    """The content of the config.json of a diffusers `VQModel`."""
    levels = range(len(config.channel_multipliers))
    attention = ["Attn" if level in config.attention_levels else "" for level in levels]
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_type": "group",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": config.widths,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "latent_channels": config.z_channels,
        "num_vq_embeddings": config.codebook_size,
        "vq_embed_dim": config.codebook_dim,
        "sample_size": config.image_size[0],  # an integer there
    }


def read_diffusers(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a `VQModel`, and those that its weights lack."""
    size = content.get("sample_size", DEFAULT_SAMPLE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    known = size != DEFAULT_SAMPLE_SIZE  # the default of its class, whatever the model's images are
    return dict(content), {"image_size": (int(height), int(width))} if known else {}


READERS = {"taming": read_taming, "diffusers": read_diffusers}
WRITERS = {"taming": write_taming, "diffusers": write_diffusers}


def read_config(project: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tokenizer's part of another project's config file, and settings beside the weights'."""
    if project not in READERS:
        raise cli.UserError(
            f"{project} has no config files; leave out --config: settings follow from weights"
        )
    import yaml  # comes with MLflow

    try:
        files.check_size(path, CONFIG_BYTES)
        return READERS[project](yaml.safe_load(path.read_text(encoding="utf-8")))  # or JSON
    except (OSError, RecursionError, yaml.YAMLError) as error:
        raise cli.UserError(f"cannot read {path}: {cli.one_line(error)}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        line = f"{path} is not the config of a {project} tokenizer: {error!r:.200}"
        raise cli.UserError(line) from error


def contradiction(written: Any, found: Any, name: str = "") -> str:
    """Where a config file differs from the one we write for the same model; "": nowhere."""
    if written == found or found is None or name in NOT_COMPARED:
        return ""
    if isinstance(written, dict) and isinstance(found, dict):
        inner = (contradiction(written[key], found[key], key) for key in written if key in found)
        return next(filter(None, inner), "")
    return f"{name} is {written} in the weights, but {found!s:.80} in the config"


# --- the script -----------------------------------------------------------------------------------

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.bin"
# diffusers renamed the parts of its attention; released files have the old names.
OLD_DIFFUSERS_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_weights(path: Path, project: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a checkpoint, and the names of what else it holds."""
    if project == "diffusers":
        new = path / DIFFUSERS_WEIGHTS
        path = path / OLD_DIFFUSERS_WEIGHTS if not new.exists() else new
    found = foreign.read_state_dict(path, FIRST_KEY)
    tensors = found.tensors
    if project == "diffusers":
        for old, name in OLD_DIFFUSERS_KEYS.items():
            tensors = {key.replace(f".{old}.", f".{name}."): x for key, x in tensors.items()}
    print(f"read: {found.wrapper or 'all'}; not read: {cli.first_few(found.others) or 'nothing'}")
    return tensors, found.ignored


def import_checkpoint(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint of another project to a model folder."""
    path, project = Path(arguments.checkpoint), arguments.source
    config_file = arguments.config or (path / "config.json" if project == "diffusers" else "")
    state, outside = read_weights(path, project)
    content, settings = read_config(project, Path(config_file)) if config_file else ({}, {})
    size = settings.pop("image_size", arguments.image_size)
    if size is None:
        raise cli.UserError(
            f"the size of the images does not follow from {path}; add --image_size H,W: 256 for "
            "most published models, or that of your images"
        )
    settings |= {"quantizer": arguments.quantizer} if arguments.quantizer else {}
    with cli.user_error(f"{path}: %s", ValueError):
        model, ignored = formats.import_weights(project, state, size, settings)
        if content and (line := contradiction(WRITERS[project](model.config), content)):
            raise ValueError(line)
        model.config = replace(model.config, image_size=arguments.image_size or size)
    if "quantize.used" in ignored:
        print("warning: the checkpoint's remap of used codes is ignored")
    print(f"ignored, not part of the model: {cli.first_few(ignored + outside) or 'nothing'}")
    inputs = {arguments.checkpoint: files.sha256(path)} if path.is_file() else {}
    origin = Provenance(lineage=(Stage.now("tokenizer", inputs, ""),))
    folder = Path(arguments.output_dir)
    files.write_folder(folder, model_files(model, origin))
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    left = formats.reconstruction_error(model)
    print(f"check: error of reconstructions {left:.2f} of a grey image's")
    if left > 1:
        print(
            "warning: it does not reconstruct smooth images: it is untrained, was trained on other "
            "images, or is not read as it was trained"
        )
    if config.quantizer in ("vq", "ema", "cosine", "ibq"):
        distance, same = formats.describe_lookup(model)
        shares = ", ".join(f"{100 * share:.0f} % by {name}" for name, share in same.items())
        print(f"check: codes at {distance:.2f} of a zero vector's error; equal indices: {shares}")
        if distance > 1:
            print(
                "warning: its codes do not fit its encodings: it may have been trained with "
                "another lookup (--quantizer vq: distance, ibq: inner product)"
            )
    print(
        f"{folder}: {parameters:,} parameters, f{config.downsampling}, "
        f"{config.codebook_size} codes of {config.codebook_dim} dimensions ({config.quantizer}), "
        f"images of {'x'.join(map(str, config.image_size or ()))}"
    )
    words = ("quantize_dataset.py", "--model_dir", folder, "--path_to_data", "DATA.csv")
    print(cli.next_command(*words))


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Convert a model folder to a checkpoint of another project."""
    project, folder = arguments.target, Path(arguments.output_dir)
    loaded = load_model(arguments.checkpoint, VQVAE)
    config = loaded.model.config
    with cli.user_error(f"{loaded.folder}: %s", ValueError):
        state = formats.export_weights(project, loaded.model)
    if project == "diffusers":
        content = {"config.json": write_diffusers(config), DIFFUSERS_WEIGHTS: state}
        files.write_folder(folder, content)
    else:
        with files.new_folder(folder) as staging:
            buffer = io.BytesIO()  # onto a full disk, torch.save raises no OSError
            torch.save({FORMATS[project].nest: state}, buffer)
            (staging / f"{project}.ckpt").write_bytes(buffer.getbuffer())
            if project == "taming":
                import yaml  # comes with MLflow

                name = "GumbelVQ" if config.quantizer == "gumbel" else "VQModel"
                model = {"target": f"taming.models.vqgan.{name}", "params": write_taming(config)}
                text = yaml.safe_dump({"model": model}, sort_keys=False)
                (staging / "config.yaml").write_text(text, encoding="utf-8")
    print(f"written: {folder}")


def main(arguments: argparse.Namespace) -> None:
    files.check_unused(Path(arguments.output_dir))
    if arguments.source:
        import_checkpoint(arguments)
        return
    for name in ("config", "image_size", "quantizer"):
        if getattr(arguments, name):
            raise cli.UserError(f"--{name} has no effect with --to; leave it out")
    export_checkpoint(arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m vqvae.convert")
    direction = parser.add_mutually_exclusive_group(required=True)
    names, add = tuple(FORMATS), parser.add_argument
    direction.add_argument("--from", dest="source", choices=names, help="project to import from")
    direction.add_argument("--to", dest="target", choices=names, help="project to export to")
    source = "--from: file, or folder of diffusers; --to: model folder, or runs:/..."
    add("--checkpoint", required=True, metavar="PATH", help=source)
    config = (
        "--from: config file of the checkpoint (taming: .yaml; diffusers: the folder's), for image "
        "size, dropout and loss weights, which do not show in the weights; the rest must agree"
    )
    add("--config", metavar="PATH", help=config)
    add("--output_dir", required=True, help="new folder to write")
    kind = "--from taming: lookup, where --config does not tell; ibq is SEED-Voken's"
    add("--quantizer", choices=("vq", "ibq"), help=kind)
    size = "--from: size of the data (default: that of --config)"
    add("--image_size", type=cli.height_and_width, help=size)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
