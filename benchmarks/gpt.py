"""The GPT beside its peers: drawing against a loop without a cache, training against GPT-2.

Rounds of all ways alternate, so that a busy machine slows all of them alike.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer import GPT, GPTConfig, generate
from transformer.sampling import draw, probabilities

GRID, CODES = (7, 7), 512  # as on MNIST


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
def draw_without_cache(model: GPT, prefix: Tensor) -> Tensor:
    """Every cell by a whole pass over all tokens before it, as minGPT's `generate` does."""
    uniforms = torch.rand(len(prefix), 49, generator=torch.Generator().manual_seed(0))
    look = partial(F.scaled_dot_product_attention, is_causal=True)
    x, drawn = model.prefix_embedding(prefix)[:, None], []
    for cell in range(49):
        turn = model.cos[: cell + 1], model.sin[: cell + 1]
        logits = model.head(model._run(x, turn, [look] * len(model.blocks))[:, -1])
        drawn.append(draw(probabilities(logits), uniforms[:, cell]))
        x = torch.cat([x, model.token_embedding(drawn[-1])[:, None]], dim=1)
    return torch.stack(drawn, dim=1).view(-1, *GRID)


def make_gpt() -> GPT:
    """4 layers of 192, untrained, but with a head that makes a choice."""
    torch.manual_seed(0)
    config = GPTConfig(codebook_size=CODES, num_classes=10, latent_dim=GRID, dropout=0.0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def sampling(batch_size: int, rounds: int) -> None:
    model = make_gpt().eval()
    prefix = torch.arange(batch_size) % 10
    cached = generate(model, prefix, batch_size=batch_size)
    same = float((cached == draw_without_cache(model, prefix)).all(dim=(1, 2)).float().mean())
    seconds = medians(
        {
            "with the cache": lambda: generate(model, prefix, batch_size=batch_size),
            "without a cache": lambda: draw_without_cache(model, prefix),
        },
        rounds,
    )
    print(f"\ndrawing {batch_size} grids of 7x7 ({100 * same:.1f} % of the grids are the same)\n")
    table(seconds, batch_size * 49)


def training(batch_size: int, rounds: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = make_gpt().train()
    shape = GPT2Config(
        vocab_size=CODES + 11, n_positions=50, n_embd=192, n_layer=4, n_head=4, use_cache=False
    )
    shape.resid_pdrop = shape.embd_pdrop = shape.attn_pdrop = 0.0
    shape.bos_token_id = shape.eos_token_id = None
    theirs = GPT2LMHeadModel(shape).train()
    prefix = torch.arange(batch_size) % 10
    indices = torch.randint(CODES, (batch_size, *GRID))
    tokens = torch.cat([prefix[:, None] + CODES, indices.flatten(1)], dim=1)
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in (ours, theirs)]

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def gpt2_loss() -> Tensor:
        logits = theirs(tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def ours_bf16() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ours(prefix, indices, loss=True).mean()

    def theirs_bf16() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gpt2_loss()

    seconds = medians(
        {
            "ours, fp32": lambda: step(optimizers[0], ours(prefix, indices, loss=True).mean()),
            "GPT-2 of transformers, fp32": lambda: step(optimizers[1], gpt2_loss()),
            "ours, bf16": lambda: step(optimizers[0], ours_bf16()),
            "GPT-2 of transformers, bf16": lambda: step(optimizers[1], theirs_bf16()),
        },
        rounds,
    )
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (ours, theirs)]
    print(f"\ntraining, batches of {batch_size}, {sizes[0]:.2f} and {sizes[1]:.2f} M weights\n")
    table(seconds, batch_size * 49)


def table(seconds: dict[str, float], tokens: int) -> None:
    """Seconds and tokens/s of each way, and how the first compares."""
    first = next(iter(seconds.values()))
    print("| | s | tokens/s | of the first way's time |\n|---|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {tokens / value:,.0f} | {value / first:.2f} |", flush=True)


def cache_memory() -> None:
    """Bytes of the cache for tall grids, with a window and without."""
    print("\ncache of a model of 16x16 cells, 4 layers of 192, one grid\n")
    print("| window | 16x16, KiB | 256x16, KiB |\n|---|---|---|")
    for window in (0, 8, 16):
        config = GPTConfig(codebook_size=CODES, latent_dim=(16, 16), window_size=window)
        sizes = [GPT(config).make_cache(1, size).nbytes / 1024 for size in ((16, 16), (256, 16))]
        print(f"| {window or 'none'} | {sizes[0]:,.0f} | {sizes[1]:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"PyTorch {torch.__version__} on a CPU, {torch.get_num_threads()} threads, medians")
    cache_memory()
    sampling(arguments.batch_size, arguments.rounds)
    training(arguments.batch_size, arguments.rounds)


if __name__ == "__main__":
    main()
