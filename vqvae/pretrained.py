"""Tokenizers of taming-transformers, LlamaGen and diffusers: into a model folder, and back."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from utils import checkpoint, cli, foreign, tracking
from vqvae import VQVAE, VQVAEConfig
from vqvae.layouts import LAYOUTS, from_other, to_other

DEFAULT_SIZE = (256, 256)  # what most of them were trained on
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# diffusers renamed its attention's parts; released files have the old names.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v."}
OLD_NAMES[".proj_attn."] = ".to_out.0."


def read_diffusers(folder: Path) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """State dict and image size of a diffusers folder.

    Raises:
        UserError: it holds no `VQModel`, or one that is built in another way.
    """
    config = checkpoint.read_json(folder / "config.json")
    for name, needed in (
        ("_class_name", "VQModel"),
        ("act_fn", "silu"),
        ("norm_num_groups", 32),
        ("norm_type", "group"),
    ):
        if config.get(name, needed) != needed:
            raise cli.UserError(
                f"{folder / 'config.json'}: {name} is {config[name]!r}, but only {needed!r} can "
                "be read"
            )
    state = checkpoint.read_tensors(folder / DIFFUSERS_WEIGHTS)
    for old, new in OLD_NAMES.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    size = config.get("sample_size", DEFAULT_SIZE[0])
    return state, (size, size)


def diffusers_config(config: VQVAEConfig) -> dict[str, object]:
    """What diffusers' config.json says of such a tokenizer."""
    kinds = [
        "Attn" * (i in config.attention_levels) for i in range(len(config.channel_multipliers))
    ]
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [config.channels * m for m in config.channel_multipliers],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": 32,
        "norm_type": "group",
        "num_vq_embeddings": config.codebook_size,
        "sample_size": config.image_size[0],
        "vq_embed_dim": config.codebook_dim,
    }


def bring_in(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint of another project into a model folder."""
    path, project = Path(arguments.checkpoint), arguments.source
    if project == "diffusers":
        state, image_size = read_diffusers(path)
    elif path.suffix == ".safetensors":
        state, image_size = checkpoint.read_tensors(path), DEFAULT_SIZE
    else:
        state, image_size = foreign.read_state_dict(path), DEFAULT_SIZE
    try:
        model, ignored = from_other(project, state, arguments.image_size or image_size)
    except ValueError as error:
        raise cli.UserError(f"{path}: {error}") from error
    if "quantize.used" in ignored:
        print("warning: the checkpoint's remap of used codes is ignored: indices are unmapped")
    print(f"ignored, not part of the model: {cli.first_few(ignored) or 'nothing'}")
    provenance = checkpoint.Provenance(command=cli.command_line())
    folder = Path(arguments.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_folder(folder, checkpoint.model_files(model, provenance))
    config, size = model.config, sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{folder}: {size:,} parameters, f{config.downsampling}"
        f", {config.codebook_size} codes of {config.codebook_dim} dimensions ({config.quantizer}), "
        f"images of {config.image_size[0]}x{config.image_size[1]}"
    )
    print(
        cli.next_command("quantize_dataset.py", "--model_dir", folder, "--path_to_data", "DATA.csv")
    )


def take_out(arguments: argparse.Namespace) -> None:
    """Convert a model folder into a checkpoint of another project."""
    loaded = checkpoint.load_model(tracking.fetch(arguments.checkpoint), VQVAE, VQVAEConfig)
    try:
        state = to_other(arguments.target, loaded.model)
    except ValueError as error:
        raise cli.UserError(f"{loaded.folder}: {error}") from error
    folder = Path(arguments.output_dir)
    if arguments.target == "diffusers":
        files = {"config.json": diffusers_config(loaded.model.config), DIFFUSERS_WEIGHTS: state}
        folder.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_folder(folder, files)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        nest = {"taming": "state_dict", "llamagen": "model"}[arguments.target]
        torch.save({nest: state}, folder / f"{arguments.target}.ckpt")
    print(f"written: {folder}")


def main(arguments: argparse.Namespace) -> None:
    (bring_in if arguments.source else take_out)(arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=tuple(LAYOUTS), help="project it comes from")
    way.add_argument("--to", dest="target", choices=tuple(LAYOUTS), help="project it goes to")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="--from: file, or folder of diffusers; --to: model folder, or runs:/...",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument(
        "--image_size",
        type=cli.height_and_width,
        metavar="H,W",
        help="of the data, with --from (default: diffusers' sample_size, else 256)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
