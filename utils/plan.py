"""What a training of the GPT will take: parameters, memory, operations, hours, storage and money.

python -m utils.plan --size L --latent_dim 16 --images 1.3e6 --epochs 300 --gpus 64

Parameters and activations are those of the model itself, the latter of one and of two blocks.
Hours are operations over the peak of the GPUs times `--utilisation`: the share of the peak that
`python -m benchmarks.gpu` measures. Memory leaves out the allocator's reserve and the CUDA context.
"""

import argparse
import math
from dataclasses import replace

import torch
from torch import Tensor

from transformer import GPT, GPTConfig
from transformer.config import SIZES
from transformer.layers import MAX_LOGITS
from utils import cli
from utils.data.indices import smallest_type

STATES = 12  # bytes a parameter in float32: weight, AdamW's two moments
GRADIENT = 4  # bytes a parameter, from the backward pass to the step of the optimizer
SIDE = 4  # of the latent grid on which activations are measured: they grow with the tokens
CAST = 2  # bytes a parameter: autocast's copy in bfloat16
LOGIT = 14  # bytes: its log-softmax, the gradients of both in float32, and one in bfloat16
# Bytes a parameter of what FSDP gathers: of a block two in bfloat16 with a buffer, a gradient and
# its float32 copy; of the rest the weights, their cast and a gradient.
BLOCK, REST = 2 + 2 + 2 + 2 + 4, 4 + CAST + 4


def parameters_of(config: GPTConfig, part: str = "") -> int:
    """Parameters of a GPT, or of a part such as "blocks", counted without memory for them."""
    with torch.device("meta"):
        return sum(x.numel() for x in GPT(config).get_submodule(part).parameters())


def flops_per_token(config: GPTConfig) -> float:
    """Forward and backward pass (arXiv 2204.02311, appendix B): 6 a weight, and the attention."""
    with torch.device("meta"):
        model = GPT(config)
    config = model.config
    weights = sum(x.numel() for x in (*model.blocks.parameters(), model.head.weight))
    return 6 * weights + 12 * config.num_layers * config.dim * math.prod(config.latent_dim)


def saved_bytes(config: GPTConfig, count: int) -> int:
    """Bytes that a forward pass in bfloat16 keeps for the backward pass, of `count` images."""
    model = GPT(config)
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address occurs twice

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    grids = torch.zeros(count, *config.latent_dim, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.loss(torch.zeros(count, dtype=torch.long), grids)
    return sum(x.nbytes() for x in storages.values())


def activation_bytes(config: GPTConfig) -> float:
    """Bytes an image that a training step keeps until its backward pass, but for the logits."""
    tokens = config.prefix_length + math.prod(config.latent_dim)
    measured = config.prefix_length + SIDE**2
    small = replace(config, latent_dim=(SIDE, SIDE), codebook_size=2)
    pair = [replace(small, num_layers=layers) for layers in (1, 2)]
    # A difference: the weights are kept as well, equally many for any number of images.
    one, two = ((saved_bytes(x, 2) - saved_bytes(x, 1)) / measured for x in pair)
    # On a GPU, norms keep their inputs as well: of layers in float32, of queries and keys in half.
    heads = (config.num_heads + config.num_kv_heads) * config.qk_norm
    norms = 8 * config.dim + 2 * config.head_dim * heads
    return tokens * (one + (config.num_layers - 1) * (two - one) + config.num_layers * norms)


def memory(config: GPTConfig, images: float, gpus: int, parallel: str, ema: bool) -> float:
    """Bytes a GPU in training, with `images` images on each of them.

    The peak is at the start of the backward pass, with all activations, or at its end, with all
    gradients; with FSDP also where all weights are gathered to evaluate and save them.
    """
    parameters, blocks = parameters_of(config), parameters_of(config, "blocks")
    kept, logits = images * activation_bytes(config), images * math.prod(config.latent_dim)
    kept += LOGIT * min(logits * config.codebook_size, MAX_LOGITS)
    states, gradients = parameters * (STATES + 4 * ema), parameters * GRADIENT
    if parallel == "fsdp":
        gathered = BLOCK * blocks / config.num_layers + REST * (parameters - blocks)
        whole = 4 * parameters * (gpus > 1)
        return states / gpus + max(gathered + max(kept, gradients / gpus), whole)
    buckets = gradients * (gpus > 1)  # of DDP
    return states + buckets + max(kept + CAST * parameters, gradients)


def main(flags: argparse.Namespace) -> None:
    config = GPTConfig(flags.codebook_size, latent_dim=flags.latent_dim, size=flags.size)
    tokens = math.prod(flags.latent_dim)
    images = flags.images * flags.epochs
    flops_a_token = flops_per_token(config)
    flops = images * tokens * flops_a_token
    hours = flops / (flags.gpus * flags.peak_tflops * 1e12 * flags.utilisation) / 3600
    on_gpu = flags.batch_size / flags.gpus
    parameters = parameters_of(config)
    rows = {
        "parameters": f"{parameters:,}",
        "steps": f"{math.ceil(images / flags.batch_size):,} of {flags.batch_size:,} images",
        "operations": f"{flops:.3g} ({flops_a_token / 1e9:.3g} GFLOP a token)",
        "hours": f"{hours:.3g} at {flags.utilisation:.0%} of {flags.peak_tflops:g} TFLOP/s",
        "price": f"{hours * flags.gpus * flags.price:,.0f} at {flags.price:g} a GPU hour",
    }
    for parallel in ("ddp", "fsdp"):
        needed = memory(config, on_gpu, flags.gpus, parallel, flags.ema) / 2**30
        rows[f"memory a GPU, {parallel}"] = f"{needed:.1f} GiB for {on_gpu:g} images"
    stored = flags.images * tokens * smallest_type(flags.codebook_size).itemsize
    rows["storage of the indices"] = f"{stored / 2**30:.3g} GiB"
    rows["storage of a checkpoint"] = f"{parameters * (12 + 4 * flags.ema) / 2**30:.3g} GiB"
    for name, text in rows.items():
        print(f"{name:<26}{text}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.plan")
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="L", help="of the GPT")
    add("--latent_dim", type=cli.height_and_width, default=(16, 16), help="H or H,W")
    add("--codebook_size", type=cli.positive, default=16384)
    add("--images", type=float, default=1.28e6, help="in the data set")
    add("--epochs", type=float, default=300)
    add("--batch_size", type=cli.positive, default=256, help="of all GPUs together")
    add("--gpus", type=cli.positive, default=1)
    add("--ema", action="store_true", help="with --ema_decay")
    add("--utilisation", type=float, default=0.4, help="share of the peak reached")
    add("--peak_tflops", type=float, default=989, help="a GPU's in bf16; H100: 989")
    add("--price", type=float, default=2.5, help="of a GPU for an hour")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
