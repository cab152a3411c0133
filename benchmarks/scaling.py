"""What an image costs beside the GPU: memory of its row, time to read the row and to decode it.

A fresh process reads an indices folder of so many rows, each with a grid of one index, as train.py
does. Decoding is that of scikit-learn's two photographs, JPEG files of 640x427 pixels. Times are
processor seconds, of which other work takes none. docs/scaling.md multiplies these numbers.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import sklearn.datasets
import torch

from benchmarks import record
from utils import cli
from utils.data.decoding import read_header, read_image
from utils.data.index_dataset import IndexDataset
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Rows

CLASSES, VALIDATION = 1000, 26  # one row in 26 is for validation, as in ImageNet
PHOTOS = "china", "flower"
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def write_folder(folder: Path, count: int) -> None:
    """An indices folder whose rows have paths, labels and splits like those of ImageNet."""
    names = [f"n{number:08}" for number in range(CLASSES)]
    labels = [names[row % CLASSES] for row in range(count)]
    splits = ["train" if row % VALIDATION else "val" for row in range(count)]
    files = [f"train/{name}/{name}_{row}.JPEG" for row, name in enumerate(labels)]
    rows = Rows({"image_path": files, "label": labels, "split": splits})
    write_indices(folder, torch.zeros(count, 1, 1), rows, IndicesMeta(2, (1, 1)))


def measure_rows(folder: Path, count: int) -> dict[str, float]:
    """Bytes a row in memory, held and at the peak, and processor seconds to read a million."""
    before, start = psutil.Process().memory_info().rss, time.process_time()
    data = IndexDataset(folder, None, latent_dim=None, val_fraction=0.1, seed=0)
    seconds, held = time.process_time() - start, psutil.Process().memory_info().rss - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT - before
    return {
        "rows": len(data.rows),
        "bytes held": held / count,
        "bytes at the peak": peak / count,
        "seconds a million rows": seconds / count * 1e6,
    }


def measure_decoding(side: int, rounds: int) -> dict[str, float]:
    """Images in a processor second: their headers alone, and decoded, resized and cropped."""
    files = [str(Path(sklearn.datasets.__file__).parent / f"images/{name}.jpg") for name in PHOTOS]
    ways = {"headers": read_header, "images": lambda file: read_image(file, 3, (side, side))}
    found = {}
    for name, read in ways.items():
        times = []
        for _ in range(rounds):
            start = time.process_time()
            for file in files:
                read(file)
            times.append(time.process_time() - start)
        found[f"{name} a second"] = len(files) / statistics.median(times)
    return found


def main(flags: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "indices"
        write_folder(folder, flags.rows)
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as process:
            results = process.submit(measure_rows, folder, flags.rows).result()
    results |= measure_decoding(flags.side, flags.rounds)
    for name, value in results.items():
        print(f"{name:<24}{value:,.0f}")
    print(f"\nwritten: {record.write('scaling', results)}")


def make_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.scaling")
    parser.add_argument("--rows", type=cli.positive, default=1_000_000, help="(default: 10^6)")
    parser.add_argument("--side", type=cli.positive, default=256, help="pixels (default: 256)")
    parser.add_argument("--rounds", type=cli.positive, default=50, help="of each (default: 50)")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
