"""Windowed attention against a dense mask and against full causal attention: time and memory.

Forward and backward, each case in a process of its own, because a peak of memory is a process's.
On a GPU FlexAttention stands beside them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import cache

import psutil
import torch
import torch.nn.functional as F

from benchmarks import record
from transformer.attention import FlexAttention, attend, visible_mask
from utils import cli

HEAD_DIM = 64
WAYS = ("window", "dense mask", "full causal")


def measure(way: str, side: int, flags: argparse.Namespace) -> dict[str, float]:
    """Median seconds, and peak memory in MiB beyond q, k, v and what any first call loads."""
    torch.manual_seed(0)
    device = torch.device(flags.device)
    shape = 1, flags.heads, 1 + side * side, HEAD_DIM
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    weights = torch.randn(shape, device=device)

    def run(side: int, mask: torch.Tensor | None) -> None:
        x = [x[:, :, : 1 + side * side] for x in (q, k, v)]
        if way in ("window", "flex"):
            shape = {"grid": (side, side), "window": flags.window, "prefix": 1, "depth": 1}
            y = (attend if way == "window" else flex(side))(*x, **shape)
        else:
            y = F.scaled_dot_product_attention(*x, attn_mask=mask, is_causal=mask is None)
        y.backward(weights[:, :, : y.shape[2]])
        if device.type == "cuda":
            torch.cuda.synchronize()

    @cache  # a training makes its mask once, too
    def flex(side: int) -> FlexAttention:
        return FlexAttention(device, grid=(side, side), window=flags.window)

    def make_mask(side: int) -> torch.Tensor | None:
        return dense_mask(side, flags.window, device) if way == "dense mask" else None

    run(16, make_mask(16))
    before = memory(device)
    mask = make_mask(side)
    if device.type == "cuda":
        run(side, mask)  # kernels are chosen and compiled by the shape
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(flags.repeats):
        start = time.perf_counter()
        run(side, mask)
        seconds.append(time.perf_counter() - start)
    peak = max(0, memory(device, peak=True) - before) / 2**20
    return {"seconds": statistics.median(seconds), "mib": peak}


def memory(device: torch.device, *, peak: bool = False) -> int:
    """Bytes in use now, or at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return psutil.Process().memory_info().rss


def dense_mask(side: int, window: int, device: torch.device) -> torch.Tensor:
    """The dense mask, built in parts: the peak is to be that of its use."""
    positions = torch.arange(1 + side * side, device=device)
    mask = torch.empty(len(positions), len(positions), dtype=torch.bool, device=device)
    for rows, part in zip(mask.split(512), positions.split(512), strict=True):
        rows[:] = visible_mask(part, positions, width=side, window=window, prefix=1)
    return mask


def in_own_process(way: str, side: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:]]
    case = ["--case", way, "--sides", str(side)]
    done = subprocess.run([*command, *case], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main(flags: argparse.Namespace) -> None:
    if flags.case:
        print(json.dumps(measure(flags.case, flags.sides[0], flags)))
        return
    ways = (*WAYS, "flex") if flags.device == "cuda" else WAYS
    print(
        f"forward and backward, 1 x {flags.heads} heads of {HEAD_DIM}, window {flags.window}, "
        f"fp32, {flags.device}, {torch.get_num_threads()} threads, medians of {flags.repeats}\n"
    )
    print("| positions | " + " | ".join(f"{way}, s | MiB" for way in ways) + " |")
    print("|---" * (1 + 2 * len(ways)) + "|")
    results = {}
    for side in flags.sides:
        cases = {way: in_own_process(way, side) for way in ways}
        columns = (f"{case['seconds']:.4f} | {case['mib']:.0f}" for case in cases.values())
        print(f"| {side}x{side} | {' | '.join(columns)} |", flush=True)
        results[f"{side}x{side}"] = cases
    print(f"\nwritten: {record.write('attention', results)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--sides", type=cli.positive, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--window", type=cli.positive, default=8)
    parser.add_argument("--heads", type=cli.positive, default=1)
    parser.add_argument("--repeats", type=cli.positive, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", choices=(*WAYS, "flex"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
