"""Trainings alone and beside busy processes, which hold the cores that OpenMP's threads wait for.

The two trainers' steps, at their default size and at a small one, in interleaved rounds. It says
nothing on a machine that other work keeps busy.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial

from benchmarks import record
from utils import cli

cli.configure_process()  # as the scripts do, before PyTorch starts OpenMP

import torch  # noqa: E402

from benchmarks.gpt import CODES, GRID, medians, our_loss, train_step  # noqa: E402
from benchmarks.tokenizer import make_step  # noqa: E402
from transformer import GPT, GPTConfig  # noqa: E402
from utils.training.config import TrainingConfig  # noqa: E402
from utils.training.optim import make_optimizer  # noqa: E402

SIDES = {"tokenizer, small": 16, "tokenizer": 32}  # pixels
DIMS = {"GPT, small": 64, "GPT": 192}
BUSY = (0, 1, 2)  # processes


def spin() -> None:
    while True:
        pass


def gpt_step(dim: int, batch_size: int) -> Callable[[], object]:
    """A training step of 4 layers on 49 tokens."""
    config = GPTConfig(codebook_size=CODES, num_classes=10, latent_dim=GRID, dim=dim, num_heads=4)
    model = GPT(config).train()
    optimizer = make_optimizer(model, TrainingConfig(), (0.9, 0.95))
    prefix, indices = torch.arange(batch_size) % 10, torch.randint(CODES, (batch_size, *GRID))
    return partial(train_step, optimizer, partial(our_loss, model, prefix, indices), "fp32")


def tokenizer_step(side: int, batch_size: int) -> Callable[[], object]:
    """A training step of the default preset on colour images."""
    flags = {"preset": "vqvae-small", "image_size": side, "precision": "fp32", "compile": False}
    step = make_step({}, argparse.Namespace(**flags), torch.device("cpu"))
    return partial(step, torch.rand(batch_size, 3, side, side) * 2 - 1)


def measure(step: Callable[[], object], flags: argparse.Namespace) -> dict[int, float]:
    """Median seconds of a few steps, by the number of busy processes beside them."""
    found: dict[int, list[float]] = {busy: [] for busy in BUSY}
    for _ in range(flags.rounds):
        for busy, seconds in found.items():
            others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(busy)]
            for other in others:
                other.start()
            seconds.append(medians({"steps": step}, flags.steps)["steps"])
            for other in others:
                other.kill()
                other.join()
    return {busy: statistics.median(seconds) for busy, seconds in found.items()}


def main(flags: argparse.Namespace) -> None:
    ways = {name: gpt_step(dim, flags.batch_size) for name, dim in DIMS.items()}
    ways |= {name: tokenizer_step(side, flags.batch_size) for name, side in SIDES.items()}
    print(f"{torch.get_num_threads()} threads, batches of {flags.batch_size}, ms a step\n")
    print("| | alone | beside 1 | beside 2 | ratio of 1 | of 2 |\n|---|---|---|---|---|---|")
    results = {}
    for name, step in ways.items():
        seconds = measure(step, flags)
        columns = [f"{1000 * value:.0f}" for value in seconds.values()]
        columns += [f"{seconds[busy] / seconds[0]:.2f}" for busy in BUSY[1:]]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)
        results[name] = {f"beside {busy}": value for busy, value in seconds.items()}
    print(f"\nwritten: {record.write('busy', results)}")


def make_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.busy")
    parser.add_argument("--batch_size", type=cli.positive, default=64)
    parser.add_argument("--rounds", type=cli.positive, default=5)
    parser.add_argument("--steps", type=cli.positive, default=5, help="that are timed in a round")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
