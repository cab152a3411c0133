"""The losses of 100 steps of both trainers, as they were when somebody last looked closely.

`python -m tests.golden` writes them anew into golden.json: after a change that is meant to change
numbers, and on no other occasion.
"""

import argparse
import json
import platform
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import torch

import train
import train_vqvae
from tests.conftest import write_images
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row
from utils.training.loop import Schedule

FILE = Path(__file__).with_name("golden.json")
STEPS = 100
TRAININGS = {
    "train_vqvae": (
        train_vqvae,
        "--path_to_data data/data.csv --channels 16 --codebook_size 32 --codebook_dim 4 "
        "--batch_size 8 --num_workers 0 --learning_rate 4e-3 --horizontal_flip",
        "train/mse",
    ),
    "train": (
        train,
        "--path_to_data indices --dim 32 --num_heads 2 --num_layers 2 --dropout 0.1 --batch_size 8 "
        "--learning_rate 4e-3 --patience 0 --precision fp32",
        "train/bits_per_token",
    ),
}


def environment() -> dict[str, str]:
    """What the last bits of a number depend on."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "threads": "1",
    }


def write_data() -> None:
    """Images and indices in the current folder, the same everywhere."""
    write_images(Path("data"), count=24)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(32, (48, 1), generator=generator)
    grids = (starts + torch.arange(60)) * 7 % 32  # an order that can be learned
    noise = torch.randint(32, grids.shape, generator=generator)
    grids = torch.where(torch.rand(grids.shape, generator=generator) < 0.2, noise, grids)
    rows = [Row(f"{n}.png", "ab"[n % 2], "val" if n % 6 == 0 else "train") for n in range(48)]
    write_indices("indices", grids.view(48, 6, 10), rows, IndicesMeta(32, (6, 10)))


def losses(name: str) -> list[float]:
    """The loss of each step of a training in the current folder, by one thread."""
    module, flags, key = TRAININGS[name]
    limits = f"--max_steps {STEPS} --max_epochs 99 --device cpu --output_dir {name}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        argv = [f"{name}.py", *flags.split(), *limits.split()]
        with patch.object(sys, "argv", argv), patch.object(Schedule, "LOG_EVERY", 1):
            module.main(module.make_parser().parse_args())
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(x) for x in Path(name, "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        write_data()
        golden = {"environment": environment()} | {name: losses(name) for name in TRAININGS}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
