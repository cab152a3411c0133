"""How many images are needed, and what faults look like: the table and picture of docs/choosing.md.

The same commands, with equal steps, on the first 500, 2,000, 10,000 and 60,000 images, which are
written as CSVs beside `--path_to_train`; a GPT with too few steps, one with too many, and a
tokenizer whose codebook collapses.
"""

import argparse
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_image

from benchmarks import record
from benchmarks.recipes import Flags, Runner, Stage, parse_recipe, plan, results
from benchmarks.showcase import call
from utils import cli, figures

MNIST = Path("data/mnist")
SIZES = (500, 2_000, 10_000, 60_000)
RECIPE = """
    train_vqvae --codebook_size 512 --learning_rate 4e-3 --max_steps 1000 --evaluate_every 250
    quantize_dataset
    train --num_layers 3 --dim 96 --num_heads 4 --dropout 0.1 --optimizer muon \
        --learning_rate 4e-3 --max_steps 600 --evaluate_every 50
    transformer_generation --num_images 2000 --guidance_scale 1.25
"""
NO_RESET = {"dead_code_threshold": "0", "no-reset_codebook_on_collapse": ""}
FAULTS: dict[str, dict[str, Flags]] = {  # with all images
    "undertrained": {"train": {"max_steps": "60", "evaluate_every": "30"}},
    "collapsed": {"train_vqvae": NO_RESET | {"learning_rate": "0.5"}},
}
COLUMNS = {  # title: metric
    "MSE": "best_mse",
    "codes used": "codebook_usage",
    "bits per token": "best_bits",
    "at last": "last_bits",
    "of training images": "last_train_bits",
    "FD": "fd_classifier",
    "right": "label_agreement",
}
CLASSES = 10  # and samples in a row of the picture


def write_first(source: Path, count: int) -> Path:
    """A CSV of the first images of another one, beside it."""
    target = source.with_name(f"{source.stem}-{count}.csv")
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(itertools.islice(file, count + 1)), encoding="utf-8")
    return target


def curves(folder: Path) -> dict[str, list[float]]:
    """The values of each metric in a training."""
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").open(encoding="utf-8"):
        for name, value in json.loads(line).items():
            found.setdefault(name, []).append(value)
    return found


def summary(stages: dict[str, Stage]) -> dict[str, float]:
    """What the table shows of a recipe."""
    tokenizer, gpt = (curves(stages[name].folder) for name in ("tokenizer", "gpt"))
    bits = gpt["val/bits_per_token"]
    return results(stages) | {
        "best_mse": min(tokenizer["val/mse"]),
        "best_bits": min(bits),
        "last_bits": bits[-1],
        "last_train_bits": gpt["train/bits_per_token"][-1],
    }


def sample_last(stages: dict[str, Stage]) -> Path:
    """Images of the last model of a training, not of its best one."""
    gpt = stages["gpt"].folder
    last = max((gpt / "checkpoints").glob("step-*"))
    sample = f"transformer_generation.py --model_path {last} --num_images {CLASSES}"
    call(f"{gpt}-last", f"{sample} --guidance_scale 1.25")
    decode = f"vqvae/images_from_indexes.py --indexes_path {gpt}-last"
    call(f"{gpt}-last-images", f"{decode} --model_dir {stages['tokenizer'].folder}")
    return Path(f"{gpt}-last-images")


def write_picture(rows: list[Path], target: Path) -> None:
    """A row of images from each folder."""
    images = [
        decode_image(str(path), ImageReadMode.RGB) / 127.5 - 1
        for folder in rows
        for path in sorted(folder.glob("[0-9]*.png"))[:CLASSES]
    ]
    figures.grid(torch.stack(images), CLASSES).save(target)


def main(flags: argparse.Namespace) -> None:
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    base, runner = parse_recipe(RECIPE), Runner(flags.work_dir)
    variants: dict[str, dict[str, Flags]] = {f"{count:,} images": {} for count in SIZES} | FAULTS
    jobs = {}
    for (name, changes), count in zip(variants.items(), (*SIZES, *SIZES[-1:] * 2), strict=True):
        data = {"path_to_data": str(write_first(flags.path_to_train, count))}
        recipe = {stage: own | changes.get(stage, {}) for stage, own in base.items()}
        for stage in ("train_vqvae", "quantize_dataset"):
            recipe[stage] = recipe[stage] | data
        jobs[name] = plan(recipe, 0, flags)
    with ThreadPoolExecutor(flags.jobs) as pool:
        list(pool.map(runner.run, [stages["quality"] for stages in jobs.values()]))
    found = {name: summary(stages) for name, stages in jobs.items()}
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{values[key]:.4g}' for key in COLUMNS.values())} |")
    rows = [stages["images"].folder for stages in jobs.values()]
    rows.insert(len(SIZES) + 1, sample_last(next(iter(jobs.values()))))
    write_picture(rows, flags.work_dir / "choosing.png")
    print(f"\nwritten: {flags.work_dir / 'choosing.png'}, {record.merge('choosing', found)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.choosing")
    parser.add_argument("--path_to_train", type=Path, default=MNIST / "train.csv")
    parser.add_argument("--path_to_test", type=Path, default=MNIST / "test.csv")
    parser.add_argument("--jobs", type=cli.positive, default=1, help="recipes run at once")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/choosing"))
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
