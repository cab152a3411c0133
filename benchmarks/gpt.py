"""The GPT beside its peers: sampling against a loop without a cache, training against GPT-2, Llama.

Rounds of all ways alternate, so that a busy machine slows all of them alike.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from transformer import GPT, GPTConfig
from transformer.distribution import probabilities, random_keys, sample_from_probs, uniform
from transformer.sampling import generate
from utils import cli, distributed
from utils.training.config import TrainingConfig
from utils.training.optim import make_optimizer

GRID, CODES = (7, 7), 512  # as on MNIST
TOKENS = GRID[0] * GRID[1]


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def sample_without_cache(model: GPT, prefix: Tensor) -> Tensor:
    """Every token by a forward over all tokens before it, as minGPT's `generate` does."""
    keys, positions = random_keys(0, torch.arange(len(prefix))), model.grid.raster()
    tokens = torch.empty(len(prefix), 0, dtype=torch.long)
    for number in range(TOKENS):
        hidden = model(tokens, positions[:number], prefix=prefix)[:, -1]
        probs = probabilities(model.head(hidden))
        sampled = sample_from_probs(probs, uniform(keys, number))
        tokens = torch.cat([tokens, sampled[:, None]], dim=1)
    return tokens.view(-1, *GRID)


def make_gpt() -> GPT:
    """4 layers of 192, untrained, but with a head that makes a choice."""
    torch.manual_seed(0)
    config = GPTConfig(codebook_size=CODES, num_classes=10, latent_dim=GRID, dropout=0.0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def make_gpt2(config: GPTConfig) -> nn.Module:
    """GPT-2 of `transformers` of the same shape, whose prefix tokens stand behind the codes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config.codebook_size + config.num_classes + 1,
        n_positions=1 + config.latent_dim[0] * config.latent_dim[1],
        n_embd=config.dim,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(shape)


def make_llama(config: GPTConfig) -> nn.Module:
    """Llama of `transformers` of the same shape, read as `make_gpt2`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.codebook_size + config.num_classes,
        max_position_embeddings=1 + math.prod(config.latent_dim),
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(shape)


def our_loss(model: GPT, prefix: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy of all indices."""
    return model.loss(prefix, indices).mean()


def peer_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of all tokens behind the first."""
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train_step(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], precision: str
) -> None:
    """Forward, backward, and a step of the optimiser."""
    device = optimizer.param_groups[0]["params"][0].device
    with distributed.autocast(device, precision):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cache_memory(flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """KiB of the cache for tall grids, with a window and without."""
    print("\ncache of a model of 16x16 latent positions, 4 layers of 192, one grid\n")
    print("| window | 16x16, KiB | 256x16, KiB |\n|---|---|---|")
    results = {}
    for window in (0, 8, 16):
        config = GPTConfig(codebook_size=CODES, latent_dim=(16, 16), window_size=window)
        sizes = [GPT(config).make_cache(1, size).nbytes / 1024 for size in ((16, 16), (256, 16))]
        print(f"| {window or 'none'} | {sizes[0]:,.0f} | {sizes[1]:,.0f} |")
        results[str(window)] = {"16x16": sizes[0], "256x16": sizes[1]}
    return results


def sampling(flags: argparse.Namespace) -> dict[str, float]:
    """Seconds of sampling one batch, with the cache and without one."""
    model, count = make_gpt().eval(), flags.batch_size
    prefix = torch.arange(count) % 10
    cached = generate(model, prefix, batch_size=count)
    same = float((cached == sample_without_cache(model, prefix)).all(dim=(1, 2)).float().mean())
    ways = {
        "with the cache": lambda: generate(model, prefix, batch_size=count),
        "without a cache": lambda: sample_without_cache(model, prefix),
    }
    print(f"\nsampling {count} grids of 7x7 ({100 * same:.1f} % of the grids are the same)\n")
    return table(medians(ways, flags.rounds), count)


def training(flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of a training step, ours and those of GPT-2 and Llama."""
    count, ours = flags.batch_size, make_gpt().train()
    peers = {
        "GPT-2 of transformers": make_gpt2(ours.config).train(),
        "Llama of transformers": make_llama(ours.config).train(),
    }
    prefix = torch.arange(count) % 10
    indices = torch.randint(CODES, (count, *GRID))
    tokens = torch.cat([prefix[:, None] + CODES, indices.flatten(1)], dim=1)
    ways: dict[str, Any] = {"ours": (our_loss, ours, prefix, indices)}
    ways |= {name: (peer_loss, peer, tokens) for name, peer in peers.items()}
    optimizers = [torch.optim.AdamW(way[1].parameters(), fused=True) for way in ways.values()]
    sizes = [sum(p.numel() for p in way[1].parameters()) / 1e6 for way in ways.values()]
    if flags.compile:
        ways |= {f"{name}, compiled": (torch.compile(x[0]), *x[1:]) for name, x in ways.items()}
    results = {}
    for precision in flags.precisions:
        steps = {
            name: partial(train_step, optimizers[number % 3], partial(*loss), precision)
            for number, (name, loss) in enumerate(ways.items())
        }
        weights = ", ".join(f"{size:.2f}" for size in sizes)
        print(f"\ntraining in {precision}, batches of {count}, {weights} M weights\n")
        results[precision] = table(medians(steps, flags.rounds), count)
    return results


class MatrixProducts(TorchDispatchMode):
    """Keeps every matrix product that is computed, to compute it again alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            shapes = [torch.randn_like(x) for x in arguments]  # of the same strides
            self.calls.append(partial(function, *shapes))
        return function(*arguments, **(options or {}))

    def compute(self) -> None:
        for call in self.calls:
            call()


def limit(flags: argparse.Namespace) -> dict[str, float]:
    """Seconds of a training step of 4 layers of 128, and of its matrix products alone."""
    torch.manual_seed(0)
    shape = {"num_classes": 10, "latent_dim": GRID, "dim": 128, "dropout": 0.0}
    model = GPT(GPTConfig(codebook_size=CODES, **shape)).train()
    optimizer = make_optimizer(model, TrainingConfig(), (0.9, 0.95))
    prefix, indices = torch.arange(64) % 10, torch.randint(CODES, (64, *GRID))
    step = partial(train_step, optimizer, partial(our_loss, model, prefix, indices), "fp32")
    with MatrixProducts() as products:
        step()
    print("\na step in fp32, batches of 64, 4 layers of 128, and its matrix products alone\n")
    return table(medians({"products": products.compute, "step": step}, flags.rounds), 64)


def optimizers(flags: argparse.Namespace) -> dict[str, float]:
    """Seconds of one step of each optimiser alone: AdamW, our Muon, PyTorch's in bfloat16."""
    model = make_gpt()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    config, maps = TrainingConfig(), model.linear_maps()
    ways: dict[str, torch.optim.Optimizer] = {
        "AdamW": make_optimizer(model, config, (0.9, 0.95)),
        "Muon": make_optimizer(model, config, (0.9, 0.95), maps),
        "torch.optim.Muon alone": torch.optim.Muon(list(maps), lr=1e-3),
    }
    print("\na step of the optimiser\n\n| | ms |\n|---|---|")
    seconds = medians({name: way.step for name, way in ways.items()}, flags.rounds)
    for name, value in seconds.items():
        print(f"| {name} | {1000 * value:.1f} |")
    return seconds


def table(seconds: dict[str, float], count: int) -> dict[str, float]:
    """Print seconds and tokens/s of each way, and how the first compares."""
    first = next(iter(seconds.values()))
    print("| | s | tokens/s | of the first way's time |\n|---|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {count * TOKENS / value:,.0f} | {value / first:.2f} |")
    return seconds


PARTS = {
    "cache": cache_memory,
    "sampling": sampling,
    "training": training,
    "limit": limit,
    "optimizers": optimizers,
}


def main(flags: argparse.Namespace) -> None:
    print(f"PyTorch {torch.__version__} on a CPU, {torch.get_num_threads()} threads, medians")
    for part in flags.parts:
        print(f"\nwritten: {record.write(f'gpt-{part}', PARTS[part](flags))}", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16")
    )
    parser.add_argument(
        "--compile", action="store_true", help="also train both compiled, which takes minutes more"
    )
    parser.add_argument("--batch_size", type=cli.positive, default=256)
    parser.add_argument("--rounds", type=cli.positive, default=5)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
