"""Start-up of every script beside `import torch`, which no script can be faster than.

`--help` reads the flags and imports what defines them, so it costs what each start costs before any
work. Interleaved rounds; processor seconds, of which other work takes none; medians.
"""

import argparse
import os
import statistics
import subprocess
import sys

from benchmarks import record
from utils import cli

SCRIPTS = (
    "train_vqvae.py",
    "quantize_dataset.py",
    "train.py",
    "transformer_generation.py",
    "vqvae/images_from_indexes.py",
    "evaluate.py",
)
LIMIT = ("-c", "import torch")


def processor_seconds(words: tuple[str, ...]) -> float:
    """What a Python process with these arguments costs."""
    before = os.times()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def measure(rounds: int) -> dict[str, float]:
    """Median processor seconds of `import torch`, and of the --help of each script."""
    ways = {"import torch": LIMIT} | {script: (script, "--help") for script in SCRIPTS}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for words in ways.values():  # the files are in the page cache afterwards
        processor_seconds(words)
    for _ in range(rounds):
        for name, words in ways.items():
            found[name].append(processor_seconds(words))
    return {name: statistics.median(values) for name, values in found.items()}


def main(flags: argparse.Namespace) -> None:
    seconds = measure(flags.rounds)
    limit = seconds["import torch"]
    print("| | seconds | ratio to `import torch` |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / limit:.2f} |")
    print(f"\nwritten: {record.write('start', seconds)}")


def make_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.start")
    parser.add_argument("--rounds", type=cli.positive, default=5)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
