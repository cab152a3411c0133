"""The GPT on a GPU: training against GPT-2 and the peak of its arithmetic, drawing against memory.

Flags that make it small let it run on a CPU, to see that it does.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.gpt import make_gpt2, peer_loss, train_step
from transformer import GPT, GPTConfig, SamplingParams
from transformer.sampling import generate
from utils import cli
from utils.plan import flops_per_token

PEAK_FLOPS = 989e12  # of an H100 SXM in bfloat16, dense (its data sheet)
BANDWIDTH = 3.0e12  # bytes/s, measured on an H100
CLASSES = 1000


def make_config(flags: argparse.Namespace, side: int) -> GPTConfig:
    return GPTConfig(
        codebook_size=flags.codebook_size,
        num_classes=CLASSES,
        latent_dim=(side, side),
        size=flags.size,
        dropout=0.0,
    ).resolve_defaults()


def seconds_of(way: Callable[[], object], flags: argparse.Namespace) -> float:
    """Mean seconds of a call, after some that warm up."""

    def finish() -> None:
        if flags.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(flags.warm_up):
        way()
    finish()
    start = time.perf_counter()
    for _ in range(flags.rounds):
        way()
    finish()
    return (time.perf_counter() - start) / flags.rounds


def training(flags: argparse.Namespace) -> dict[str, float]:
    """tokens/s in bf16, compiled, ours and GPT-2's of the same size, and our share of the peak."""
    side, count = flags.side, flags.batch_size
    config = make_config(flags, side)
    ours, theirs = GPT(config).to(flags.device), make_gpt2(config).to(flags.device)
    prefix = torch.randint(CLASSES, (count,), device=flags.device)
    indices = torch.randint(flags.codebook_size, (count, side, side), device=flags.device)
    tokens = torch.cat([prefix[:, None] + flags.codebook_size, indices.flatten(1)], dim=1)
    if flags.compile:
        theirs.compile()

    loss = torch.compile(ours.loss) if flags.compile else ours.loss

    def speed(model: torch.nn.Module, loss: Callable[[], Tensor]) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = seconds_of(lambda: train_step(optimizer, loss, "bf16"), flags)
        return count * side * side / step

    results = {
        "tokens_per_second": speed(ours, lambda: loss(prefix, indices).mean()),
        "gpt2_tokens_per_second": speed(theirs, lambda: peer_loss(theirs, tokens)),
    }
    own = results["tokens_per_second"]
    return results | {
        "ratio": own / results["gpt2_tokens_per_second"],
        "share_of_peak": own * flops_per_token(ours.config) / PEAK_FLOPS,
    }


def drawing(flags: argparse.Namespace, side: int, count: int, scale: float) -> dict[str, float]:
    """ms a step in bf16, and how near that comes to the time in which memory is read once.

    What a step must read: all weights but the embeddings, and earlier keys and values.
    All that `generate` does counts: the step and its sample, which are one graph if compiled.
    """
    model = GPT(make_config(flags, side)).to(flags.device).to(torch.bfloat16).eval()
    prefix = torch.arange(count) % CLASSES
    params = SamplingParams(guidance_scale=scale)
    options = {"batch_size": count, "params": params, "compiled": flags.compile}
    step = seconds_of(lambda: generate(model, prefix, **options), flags) / side**2
    matrices = sum(p.nbytes for p in (*model.blocks.parameters(), model.head.weight))
    rows = count if scale == 1 else 2 * count
    limit = (matrices + model.make_cache(rows).nbytes / 2) / BANDWIDTH
    return {
        "ms_a_step": 1000 * step,
        "tokens_per_second": count / step,
        "share_of_bandwidth": limit / step,
    }


def main(flags: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")
    results = {
        f"training, {flags.side**2} tokens, batch {flags.batch_size}": training(flags),
        f"drawing 8 with guidance, {flags.large_side**2} tokens": drawing(
            flags, flags.large_side, 8, 2.0
        ),
        f"drawing {flags.draw_batch}, {flags.side**2} tokens": drawing(
            flags, flags.side, flags.draw_batch, 1.0
        ),
    }
    print(f"GPT-{flags.size}, bf16, {'compiled' if flags.compile else 'eager'}, {flags.device}\n")
    for title, values in results.items():
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in values.items())
        print(f"{title}: {figures}")
    print(f"\nwritten: {record.write('gpu', results)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", default="L", help="of GPTConfig (default: L)")
    parser.add_argument("--side", type=cli.positive, default=16, help="of the trained grid")
    parser.add_argument("--large_side", type=cli.positive, default=24, help="of guided drawing")
    parser.add_argument("--codebook_size", type=cli.positive, default=16384)
    parser.add_argument("--batch_size", type=cli.positive, default=64, help="of training")
    parser.add_argument("--draw_batch", type=cli.positive, default=256, help="of drawing")
    parser.add_argument("--warm_up", type=cli.positive, default=3)
    parser.add_argument("--rounds", type=cli.positive, default=10)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
