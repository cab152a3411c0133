"""Windowed attention against a dense mask and against full causal attention: time and memory.

Forward and backward, each case in a process of its own, because a peak of memory is a process's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # run by its path: the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import torch
import torch.nn.functional as F

from transformer.attention import attend, window_mask

WAYS = ("window", "dense mask", "full causal")


def measure(way: str, side: int, window: int, heads: int, repeats: int) -> dict[str, float]:
    """Median seconds, and peak memory in MiB beyond q, k, v and what any first call loads."""
    torch.manual_seed(0)
    length = 1 + side * side
    q, k, v = (torch.randn(1, heads, length, 64, requires_grad=True) for _ in range(3))
    weights = torch.randn(1, heads, length, 64)

    def run(side: int, mask: torch.Tensor | None) -> None:
        x = [x[:, :, : 1 + side * side] for x in (q, k, v)]
        if way == "window":
            y = attend(*x, grid=(side, side), window=window, prefix=1)
        else:
            y = F.scaled_dot_product_attention(*x, attn_mask=mask, is_causal=mask is None)
        y.backward(weights[:, :, : y.shape[2]])

    run(16, make_mask(16, window) if way == "dense mask" else None)
    before = psutil.Process().memory_info().rss
    mask = make_mask(side, window) if way == "dense mask" else None
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(side, mask)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds), "mib": max(0, peak - before) / 2**20}


def make_mask(side: int, window: int) -> torch.Tensor:
    """The dense mask, built in parts: the peak is to be that of its use."""
    positions = torch.arange(1 + side * side)
    mask = torch.empty(len(positions), len(positions), dtype=torch.bool)
    for rows, part in zip(mask.split(512), positions.split(512), strict=True):
        rows[:] = window_mask(part, positions, width=side, window=window, prefix=1)
    return mask


def in_own_process(way: str, side: int, window: int, heads: int, repeats: int) -> dict[str, float]:
    case = ["--case", way, "--sides", side, "--window", window]
    options = ["--heads", heads, "--repeats", repeats]
    command = [sys.executable, __file__, *map(str, case), *map(str, options)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    fixed = {name: getattr(arguments, name) for name in ("window", "heads", "repeats")}
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.sides[0], **fixed)))
        return
    print(
        f"forward and backward, 1 x {arguments.heads} heads of 64, window {arguments.window}, "
        f"fp32, {torch.get_num_threads()} threads, medians of {arguments.repeats}\n"
    )
    print("| cells | " + " | ".join(f"{way}, s | MiB" for way in WAYS) + " | ratios of time |")
    print("|---" * (2 + 2 * len(WAYS)) + "|")
    for side in arguments.sides:
        cases = [in_own_process(way, side, **fixed) for way in WAYS]
        columns = " | ".join(f"{case['seconds']:.4f} | {case['mib']:.0f}" for case in cases)
        ratios = ", ".join(f"{case['seconds'] / cases[0]['seconds']:.1f}" for case in cases[1:])
        print(f"| {side}x{side} | {columns} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
