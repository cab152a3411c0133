"""The adaptive discriminator schedule: the same training with it and without.

Both are trained by train_vqvae.py on patches of the two photographs that scikit-learn ships, of
which the right quarter is for validation. A training that already stands in --output_dir is not
repeated.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from benchmarks import record
from utils import cli

SIDE, STEP = 64, 16  # of a patch, and from one to the next, in pixels
WAYS = {"adaptive": "--disc_adaptive_schedule", "constant": "--no-disc_adaptive_schedule"}
BOUND = 0.2  # what the validation error may rise by
START = 0.5  # share of the training without a discriminator
TOKENIZER = (
    *("--patch_size", "4", "--channel_multipliers", "1,2", "--channels", "32"),
    *("--codebook_size", "256", "--disc_channels", "16", "--disc_layers", "2"),
    *("--batch_size", "16", "--learning_rate", "1e-3", "--max_epochs", "1000000"),
)


class Curve(NamedTuple):
    """What a training logged.

    Attributes:
        errors: validation MSE by step.
        strengths: of the adversarial term, by step.
        level: the validation MSE before the discriminator came.
        rise: the worst error after that, over the level, less 1.
    """

    errors: dict[int, float]
    strengths: dict[int, float]
    level: float
    rise: float


def write_patches(folder: Path) -> Path:
    """Cut both photographs into patches that do not reach across the split; their CSV."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, pixels in enumerate(load_sample_images().images):
        height, width, _ = pixels.shape
        border = width * 3 // 4
        for split, left, right in (("train", 0, border), ("val", border, width)):
            for y in range(0, height - SIDE + 1, STEP):
                for x in range(left, right - SIDE + 1, STEP):
                    name = f"{number}-{y:03}-{x:03}.png"
                    Image.fromarray(pixels[y : y + SIDE, x : x + SIDE]).save(folder / name)
                    rows.append([name, split])
    random.Random(0).shuffle(rows)  # so that the first, which are shown, are of everywhere
    path = folder / "patches.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image_path", "split"], *rows])
    return path


def train(data: Path, folder: Path, way: str, flags: argparse.Namespace) -> None:
    """One training as a user would start it."""
    script = Path(__file__).resolve().parents[1] / "train_vqvae.py"
    command = [
        *(sys.executable, str(script), "--path_to_data", str(data), *TOKENIZER, way),
        *("--disc_weight", str(flags.disc_weight), "--disc_start", str(START)),
        *("--max_steps", str(flags.max_steps), "--evaluate_every", str(flags.evaluate_every)),
        *("--experiment", "adversarial", "--output_dir", str(folder)),
    ]
    if subprocess.run(command, check=False).returncode:
        raise cli.UserError(f"the training in {folder} failed, see above")


def read_curve(folder: Path, start: int) -> Curve:
    """The curve of a training whose discriminator came at step `start`."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]

    def column(name: str) -> dict[int, float]:
        return {row["step"]: row[name] for row in rows if name in row}

    errors = column("val/mse")
    level = errors[max(step for step in errors if step <= start)]
    worst = max(error for step, error in errors.items() if step > start)
    return Curve(errors, column("train/disc_strength"), level, worst / level - 1)


def draw(curves: dict[str, Curve], start: int, path: Path) -> None:
    """Validation error and strength of the adversarial term along both trainings, as a PNG."""
    from matplotlib.figure import Figure  # comes with MLflow

    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, curve in curves.items():
        (line,) = top.plot(*zip(*curve.errors.items(), strict=True), label=name)
        colour = line.get_color()
        bottom.plot(*zip(*curve.strengths.items(), strict=True), color=colour)
    level = next(iter(curves.values())).level
    top.axhline(level, color="grey", linewidth=0.8, label="before the discriminator")
    top.axhline(level * (1 + BOUND), color="grey", linestyle="--", label=f"{BOUND:+.0%}")
    for axes in (top, bottom):
        axes.axvline(start, color="grey", linestyle=":")
    after = [e for c in curves.values() for step, e in c.errors.items() if step >= start / 2]
    top.set_ylim(min(after) * 0.9, max([*after, level * (1 + BOUND)]) * 1.05)
    top.set_ylabel("validation MSE on [0, 1]")
    top.legend()
    bottom.set_ylabel("strength")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=80)


def main(flags: argparse.Namespace) -> None:
    folder = Path(flags.output_dir)
    data = folder / "data" / "patches.csv"
    if not data.is_file():
        write_patches(data.parent)
    start = round(START * flags.max_steps)
    curves: dict[str, Curve] = {}
    for name, way in WAYS.items():
        if not (folder / name / "best").exists():
            train(data, folder / name, way, flags)
        curves[name] = read_curve(folder / name, start)
    draw(curves, start, folder / "adversarial.png")
    print("\n| | MSE before the discriminator | worst after | rise | last |\n|---|---|---|---|---|")
    results: dict[str, Any] = {"disc_weight": flags.disc_weight, "start": start}
    for name, curve in curves.items():
        worst, last = curve.level * (1 + curve.rise), list(curve.errors.values())[-1]
        print(f"| {name} | {curve.level:.5f} | {worst:.5f} | {curve.rise:+.1%} | {last:.5f} |")
        results[name] = curve._asdict()
    print(f"\nwritten: {folder / 'adversarial.png'}, {record.write('adversarial', results)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--output_dir", default="outputs/adversarial", help="for both trainings")
    parser.add_argument("--max_steps", type=cli.positive, default=2000, help="of each training")
    parser.add_argument("--evaluate_every", type=cli.positive, default=50, help="steps")
    parser.add_argument("--disc_weight", type=float, default=0.8, help="VQGAN's by default")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
