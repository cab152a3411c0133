"""Checkpoints of other projects as model folders of this one."""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from transformer.config import GPTConfig
from transformer.gpt import GPT
from utils import cli, foreign
from utils.data.vocabulary import FILE, Vocabulary
from utils.files import check_unused, sha256, write_folder
from utils.provenance import Provenance, Stage
from utils.training import checkpoint

# LlamaGen (arXiv 2406.06525): heads by width, where a head is not 64 wide.
LLAMAGEN_HEADS = {3200: 32, 4096: 32}
LAYER = re.compile(r"layers\.(\d{1,4})\.")


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (heads * d, dim), reordered for `rotate`.

    LlamaGen turns neighbours (2i, 2i + 1) together, this project (i, i + d/2). Queries and keys
    reordered alike have the same products.
    """
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, d / 2, 2, dim)
    return pairs.transpose(1, 2).flatten(0, 2)


def _sizes(weights: dict[str, Tensor], key: str) -> tuple[int, int]:
    """Rows and columns of a matrix of the checkpoint.

    Raises:
        ValueError: there is none of this name.
    """
    if key not in weights:
        raise ValueError(f"the checkpoint has no {key!r}")
    if weights[key].dim() != 2:
        raise ValueError(f"{key!r} of the checkpoint is no matrix but {tuple(weights[key].shape)}")
    return weights[key].shape


def from_llamagen(weights: dict[str, Tensor], latent_dim: tuple[int, int], heads: int = 0) -> GPT:
    """A class-conditional GPT of LlamaGen, with the same logits.

    Args:
        weights: its state dict.
        latent_dim: rows and columns (h, w) of the grid it was trained on.
        heads: attention heads; 0: what LlamaGen's models of this width have.

    Returns:
        The model in eval mode, float32.

    Raises:
        ValueError: weights that are missing, left over, or of a text-to-image model.
    """
    if "cls_embedding.embedding_table.weight" not in weights:
        raise ValueError("no class-conditional GPT of LlamaGen: it has no cls_embedding table")
    weights = {key: value.float() for key, value in weights.items()}
    layers = [int(found[1]) for found in map(LAYER.match, weights) if found]
    num_layers = 1 + max(layers, default=0)
    if layers and num_layers > len(layers):
        raise ValueError(f"the checkpoint names layer {num_layers - 1}, but has not so many")
    codebook_size, dim = _sizes(weights, "tok_embeddings.weight")
    heads = heads or LLAMAGEN_HEADS.get(dim, dim // 64)
    if heads < 1 or dim % heads:
        raise ValueError(f"a width of {dim} has no {heads} heads; give their number by --num_heads")
    kv_rows = _sizes(weights, "layers.0.attention.wqkv.weight")[0] - dim
    kv_heads = kv_rows // (2 * (dim // heads))
    if kv_heads < 1:
        raise ValueError(
            "'layers.0.attention.wqkv.weight' of the checkpoint has no keys and values"
        )
    config = GPTConfig(
        codebook_size=codebook_size,
        num_classes=_sizes(weights, "cls_embedding.embedding_table.weight")[0] - 1,
        latent_dim=latent_dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        dim=dim,
        hidden_dim=_sizes(weights, "layers.0.feed_forward.w1.weight")[0],
        qk_norm=False,
        blank_prefix=True,
    )
    names = {
        "prefix_embedding.weight": "cls_embedding.embedding_table.weight",
        "token_embedding.weight": "tok_embeddings.weight",
        "norm.weight": "norm.weight",
        "head.weight": "output.weight",
    }
    for number in range(num_layers):
        ours, theirs = f"blocks.{number}", f"layers.{number}"
        names |= {
            f"{ours}.norm_attention.weight": f"{theirs}.attention_norm.weight",
            f"{ours}.attention.out.weight": f"{theirs}.attention.wo.weight",
            f"{ours}.norm_feed_forward.weight": f"{theirs}.ffn_norm.weight",
            f"{ours}.feed_forward.out.weight": f"{theirs}.feed_forward.w2.weight",
        }
    try:
        state = {ours: weights.pop(theirs) for ours, theirs in names.items()}
        for number in range(num_layers):
            layer = f"layers.{number}"
            q, k, v = weights.pop(f"{layer}.attention.wqkv.weight").split(
                [dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
            )
            state[f"blocks.{number}.attention.qkv.weight"] = torch.cat(
                [_halves(q, heads), _halves(k, kv_heads), v]
            )
            state[f"blocks.{number}.feed_forward.gate_and_value.weight"] = torch.cat(
                [weights.pop(f"{layer}.feed_forward.{name}.weight") for name in ("w1", "w3")]
            )
    except KeyError as error:
        raise ValueError(f"the checkpoint has no {error}") from error
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"weights of layer {number} do not fit together: {line}") from error
    left = sorted(key for key in weights if key not in ("freqs_cis", "causal_mask"))
    if left:
        raise ValueError(f"the checkpoint has weights of no use here: {cli.first_few(left)}")
    model = GPT(config)
    for name, weight in model.state_dict().items():
        if state[name].shape != weight.shape:
            raise ValueError(
                f"what becomes {name} is {tuple(state[name].shape)} in the checkpoint, but "
                f"{tuple(weight.shape)} is needed"
            )
    model.load_state_dict(state)
    return model.eval()


def main(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.output_dir)
    check_unused(folder)
    weights = foreign.read_state_dict(arguments.checkpoint).tensors
    model = cli.build(from_llamagen, weights, arguments.latent_dim, arguments.num_heads)
    config = model.config
    words = Vocabulary(
        config.codebook_size, config.latent_dim, tuple(map(str, range(config.num_classes)))
    )
    inputs = {arguments.checkpoint: sha256(Path(arguments.checkpoint))}
    origin = Provenance(lineage=(Stage.now("gpt", inputs, ""),))
    write_folder(folder, checkpoint.model_files(model, origin) | {FILE: words.content()})
    print(
        f"{config.num_layers} layers of {config.dim}, {config.num_heads} heads, "
        f"{config.num_classes} classes, {config.codebook_size} codes: written to {folder}"
    )
    print(
        cli.next_command("transformer_generation.py", "--model_path", folder, "--num_images", "8")
    )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m transformer.convert")
    parser.add_argument(
        "--from", choices=("llamagen",), required=True, help="whose checkpoint it is"
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="such as c2i_B_256.pt")
    parser.add_argument("--output_dir", required=True, help="model folder to write")
    parser.add_argument(
        "--latent_dim",
        type=cli.height_and_width,
        default=(16, 16),
        metavar="H,W",
        help="grid it was trained on: 16 for 256 pixels (default), 24 for 384",
    )
    parser.add_argument(
        "--num_heads",
        type=cli.positive,
        default=0,
        help="attention heads (default: as the width says)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
