"""The GPT in shards: the memory of its training beside the plan's; and what two processes cost.

python -m benchmarks.fsdp --size XL --steps 10 --device cuda
python -m benchmarks.fsdp --tiny --device cpu

Memory is the peak of training steps on random indices in one process, in bf16. The cost is that
of DDP: 2 processes of 1 thread against 1 process of 2 threads, on the CPU, with equal batches.
"""

import argparse
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as multiprocessing

from benchmarks import record
from benchmarks.gpt import GRID, make_gpt
from transformer import GPT, GPTConfig
from utils import cli, distributed, plan
from utils.training.config import TrainingConfig
from utils.training.loop import clip_gradients, update_weights
from utils.training.optim import make_optimizer

BETAS = (0.9, 0.95)


def peak_memory(device: str) -> float:
    """GiB so far: allocated on a GPU; on the CPU, of the whole process now."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def train(
    model: GPT, group: distributed.Distributed, images: int, steps: int, precision: str
) -> list[float]:
    """Seconds of each step on `images` random grids in all processes."""
    config, device, seconds = model.config, group.device, []
    optimizer, forward = make_optimizer(model, TrainingConfig(), BETAS), group.wrap(model)
    count = images // group.world_size
    for _ in range(steps):
        start = time.perf_counter()
        prefix = torch.randint(config.num_classes, (count,), device=device)
        indices = torch.randint(config.codebook_size, (count, *config.latent_dim), device=device)
        with distributed.autocast(device, precision):
            value = model.loss(prefix, indices, forward=forward).mean()
        value.backward()
        clip_gradients(optimizer, 1.0)
        update_weights(optimizer, 1e-4)
        float(value.detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds


def fsdp_memory(flags: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """GiB measured and planned, and the median step, in one process: whole and in shards.

    `flags` has `device`, `size`, `steps` and `tiny`.
    """
    side, codes, images = (4, 64, 4) if flags.tiny else (16, 16384, 16)
    size = "tiny" if flags.tiny else flags.size
    config = GPTConfig(codes, num_classes=1000, latent_dim=(side, side), size=size, dropout=0.0)
    for parallel in ("ddp", "fsdp"):
        gc.collect()
        if flags.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = 0.0 if flags.device == "cuda" else peak_memory(flags.device)
        group, model = distributed.init_distributed(flags.device, 0), GPT(config)
        if parallel == "fsdp":
            group.fully_shard(model, model.blocks, "bf16")
        else:
            model.to(group.device)
        step = statistics.median(train(model, group, images, flags.steps, "bf16"))
        measured = peak_memory(flags.device) - before
        planned = plan.memory(config, images, 1, parallel, ema=False) / 2**30
        group.shutdown()
        del model
        row = {"measured_gib": measured, "planned_gib": planned, "seconds": step}
        yield (
            f"GPT-{size}, {images} images of {side**2} tokens, {parallel}",
            row | {"measured_over_planned": measured / planned},
        )


def work(rank: int, processes: int, threads: int, steps: int, folder: str) -> None:
    """Train in one of the processes of DDP; the main one writes its seconds."""
    torch.set_num_threads(threads)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getppid() % 9000)}
    os.environ |= address | {"WORLD_SIZE": str(processes), "RANK": str(rank)}
    group = distributed.init_distributed("cpu", 0)
    seconds = train(make_gpt(), group, 64, steps, "fp32")
    if group.is_main:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))
    group.shutdown()


def ddp_overhead(rounds: int, steps: int) -> dict[str, float]:
    """Median seconds a step of both ways, in rounds that alternate, and their ratio."""
    ways = {"one_process": (1, 2), "two_processes": (2, 1)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, (processes, threads) in ways.items():
                multiprocessing.spawn(work, (processes, threads, steps, folder), nprocs=processes)
                found = json.loads(Path(folder, "seconds.json").read_text())
                seconds[name] += found[min(2, len(found) - 1) :]  # the first ones warm up
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return medians | {"ratio": medians["two_processes"] / medians["one_process"]}


def main(flags: argparse.Namespace) -> None:
    rows = dict(fsdp_memory(flags)) if flags.steps else {}
    if flags.rounds:
        name = f"DDP on two cores, 4 layers of 192, 64 images of {math.prod(GRID)} tokens"
        rows[name] = ddp_overhead(flags.rounds, flags.ddp_steps)
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(f"\nwritten: {record.merge('fsdp', rows)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.fsdp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="for memory")
    parser.add_argument("--size", default="XL", help="of the GPT (default: XL)")
    parser.add_argument("--steps", type=int, default=10, help="for memory; 0: not measured")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="of DDP; 0: not measured")
    parser.add_argument("--ddp_steps", type=cli.positive, default=12, help="in a round of DDP")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
