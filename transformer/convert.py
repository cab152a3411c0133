"""Class-conditional GPTs of LlamaGen as model folders of this project."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.config import GPTConfig
from transformer.gpt import GPT
from transformer.sampling import generate
from utils import cli, files, foreign
from utils.data.vocabulary import FILE, Vocabulary
from utils.provenance import Provenance, Stage, model_files

# LlamaGen (arXiv 2406.06525): heads by width, where a head is not 64 wide.
LLAMAGEN_HEADS = {3200: 32, 4096: 32}
CLASSES, CODES = "cls_embedding.embedding_table.weight", "tok_embeddings.weight"
QKV, GATE = "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"
# LlamaGen's keys by ours; {i} is the number of a layer. Several are concatenated by rows.
KEYS = {
    "prefix_embedding.weight": (CLASSES,),
    "token_embedding.weight": (CODES,),
    "norm.weight": ("norm.weight",),
    "head.weight": ("output.weight",),
    "blocks.{i}.norm_attention.weight": ("layers.{i}.attention_norm.weight",),
    "blocks.{i}.attention.qkv.weight": ("layers.{i}.attention.wqkv.weight",),
    "blocks.{i}.attention.out.weight": ("layers.{i}.attention.wo.weight",),
    "blocks.{i}.norm_feed_forward.weight": ("layers.{i}.ffn_norm.weight",),
    "blocks.{i}.feed_forward.gate_and_value.weight": (
        "layers.{i}.feed_forward.w1.weight",
        "layers.{i}.feed_forward.w3.weight",
    ),
    "blocks.{i}.feed_forward.out.weight": ("layers.{i}.feed_forward.w2.weight",),
}
# Other models, by a part of a key that only they have.
OTHERS = {
    "a text-to-image GPT of LlamaGen": "cls_embedding.cap_proj.",
    "a transformer of VAR": "word_embed.",
    "a tokenizer; use python -m vqvae.convert": "encoder.conv_in.",
}
BUFFERS = {"freqs_cis", "causal_mask"}  # not used here


def from_llamagen(weights: dict[str, Tensor], latent_dim: tuple[int, int], heads: int = 0) -> GPT:
    """The GPT with these weights of a class-conditional one of LlamaGen, in eval mode and float32.

    `latent_dim` is the grid (h, w) of its training; 0 heads are those of LlamaGen's model.
    """
    for other, part in OTHERS.items():
        if any(part in name for name in weights):
            raise ValueError(f"this is {other}, not a class-conditional GPT of LlamaGen")
    num_layers = sum(name.endswith(".wqkv.weight") for name in weights)
    keys = {
        ours.format(i=i): [key.format(i=i) for key in theirs]
        for i in range(num_layers)
        for ours, theirs in KEYS.items()
    }
    try:
        codebook_size, dim = weights[CODES].shape
        heads = heads or LLAMAGEN_HEADS.get(dim, dim // 64)
        if heads < 1 or dim % heads:
            raise ValueError(f"a width of {dim} has no {heads} heads; set their number (num_heads)")
        config = GPTConfig(
            codebook_size=codebook_size,
            num_classes=len(weights[CLASSES]) - 1,
            latent_dim=latent_dim,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=(len(weights[QKV]) - dim) // (2 * (dim // heads)),
            dim=dim,
            hidden_dim=len(weights[GATE]),
            positions="rotary",
            rope_base=10000.0,
            qk_norm=False,
            blank_prefix=True,
        )
        model = GPT(config)
        state = {
            ours: torch.cat([weights[key].float() for key in theirs])
            for ours, theirs in keys.items()
        }
    except KeyError as error:
        raise ValueError(f"the checkpoint has no {error}") from error
    for name, own in model.state_dict().items():
        if state[name].shape != own.shape:
            found = tuple(state[name].shape)
            raise ValueError(f"{' + '.join(keys[name])} must be {tuple(own.shape)}, got {found}")
        if name.endswith("qkv.weight"):
            state[name] = _rotate_halves(state[name], config)
    unknown = weights.keys() - BUFFERS - {key for group in keys.values() for key in group}
    if unknown:
        raise ValueError(f"the checkpoint has unknown weights: {cli.first_few(sorted(unknown))}")
    model.load_state_dict(state)
    return model.eval()


def _rotate_halves(qkv: Tensor, config: GPTConfig) -> Tensor:
    """The rows of queries and keys: LlamaGen rotates 2i and 2i + 1 together, we i and i + d/2."""
    rows = (config.num_heads + config.num_kv_heads) * config.head_dim
    pairs = qkv[:rows].unflatten(0, (-1, config.head_dim // 2, 2))  # (heads, d / 2, 2, dim)
    return torch.cat([pairs.transpose(1, 2).flatten(0, 2), qkv[rows:]])


@torch.inference_mode()
def sample_bits(model: GPT) -> float:
    """Bits per token of two rows that it samples, of up to four classes.

    A model that is read with the wrong number of heads or size of grid is unsure of its samples.
    """
    classes = torch.arange(min(4, model.config.num_classes))
    height, width = model.config.latent_dim
    rows = generate(model, classes, size=(min(2, height), width))
    grids = F.pad(rows, (0, 0, 0, height - rows.shape[1]))
    return float(model.loss(classes, grids)[:, : rows[0].numel()].mean()) / math.log(2)


def main(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.output_dir)
    files.check_unused(folder)
    weights = foreign.read_state_dict(arguments.checkpoint, CODES).tensors
    model = cli.build_or_error(from_llamagen, weights, arguments.latent_dim, arguments.num_heads)
    config = model.config
    classes = tuple(map(str, range(config.num_classes)))
    vocabulary = Vocabulary(config.codebook_size, config.latent_dim, class_names=classes)
    inputs = {arguments.checkpoint: files.sha256(Path(arguments.checkpoint))}
    origin = Provenance(lineage=(Stage.now("gpt", inputs, ""),))
    content = model_files(model, origin) | {FILE: vocabulary.content()}
    files.write_folder(folder, content)
    bits, uniform = sample_bits(model), math.log2(config.codebook_size)
    print(f"check: {bits:.2f} bits per token of its own samples, {uniform:.2f} of uniform indices")
    if bits > 0.9 * uniform:
        print(
            "warning: it hardly predicts its own samples: it is untrained, or --latent_dim or "
            "--num_heads is wrong"
        )
    print(f"{config.num_layers} layers of {config.dim}, {config.num_heads} heads: {folder}")
    print(cli.next_command("transformer_generation.py", "--model_path", folder))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m transformer.convert")
    add = parser.add_argument
    add("--from", choices=("llamagen",), required=True, help="project to import from")
    add("--checkpoint", required=True, metavar="FILE", help="such as c2i_B_256.pt")
    add("--output_dir", required=True, help="model folder to write")
    text = "grid it was trained on: 16 for 256 pixels (default), 24 for 384"
    add("--latent_dim", type=cli.height_and_width, default=(16, 16), help=text)
    text = "attention heads (default: follows from the width)"
    add("--num_heads", type=cli.positive, default=0, help=text)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
