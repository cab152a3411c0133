"""Fine-tuning against training from scratch: a GPT of MNIST without a digit, then a few of it.

Tokenizer and GPT are trained without the digit. Each row of the table is a GPT that is trained on a
few images of it: bits per token of further ones, and the share of its samples that a classifier of
all digits gives that label. Also for grids of another size, with `--grid_positions`.

`--part emoji` tunes a GPT of CIFAR-10 (`--model_path`, with its tokenizer `--model_dir`) to a few
emoji and their classes (`--data`, of `utils.data.download emoji`).
"""

import argparse
import csv
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.showcase import call
from utils import cli
from utils.data.images import ImageDataset
from utils.evaluation import features
from utils.evaluation.features import ImageSet, Settings
from utils.evaluation.metrics import WIDTH, resample

DIGIT, SHOTS = "7", 300
COUNTS = {"base": 8000, "digit": SHOTS + 700, "train": 6000}  # images of each CSV
VALIDATION = 1000  # emoji
SHAPE = "--dim 96 --num_layers 3 --num_heads 4 --weight_decay 0.05 --patience 0"
TRAIN = "train.py --path_to_data {work}/{data} --batch_size 50"
SHORT, LONG = 60, 600  # steps
ROWS = {
    "from scratch": f"{SHAPE} --max_steps {SHORT}",
    "from scratch, ten times the steps": f"{SHAPE} --max_steps {LONG} --evaluate_every 60",
    "fine-tuned": f"--init_from {{work}}/gpt --max_steps {SHORT}",
    "fine-tuned, LoRA of rank 8": f"--init_from {{work}}/gpt --lora_rank 8 --max_steps {SHORT} "
    "--learning_rate 4e-3",
    "fine-tuned, without blocks": f"--init_from {{work}}/gpt --freeze blocks --max_steps {SHORT}",
}
GRIDS = {
    "from scratch": f"{SHAPE} --max_steps {SHORT}",
} | {
    f"{name} positions": f"--init_from {{work}}/gpt --grid_positions {name} --max_steps {SHORT}"
    for name in ("interpolate", "extrapolate")
}
SAMPLES, LARGE, SPREAD = 2000, 42, ", spread"
EMOJI = "train.py --path_to_data {work}/emoji --caption_length 0 --optimizer muon "
EMOJI += "--learning_rate 4e-3 --dropout 0.3 --evaluate_every 30"
EMOJI_SCALES = (1.5, 3.0, 5.0, 8.0, 12.0)  # of guidance
EMOJI_SHAPE = "--dim 128"
EMOJI_ROWS = {
    "from scratch": f"{EMOJI_SHAPE} --max_steps {{steps}}",
    "from scratch, ten times the steps": f"{EMOJI_SHAPE} --max_steps {{steps}}0",
    "fine-tuned": "--init_from {model_path} --max_steps {steps}",
}


def write_csv(rows: list[dict[str, str]], data: Path, path: Path, *, shots: int = 0) -> None:
    """A CSV and copies of its images; with `shots`, the first so many are for training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "label"] + (["split"] if shots else []))
        for number, row in enumerate(rows):
            image = path.parent / row["image_path"]
            image.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / row["image_path"], image)
            split = ["train" if number < shots else "val"] if shots else []
            writer.writerow([row["image_path"], row["label"], *split])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV in a random order."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    return rows


def in_turn(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with their classes in turn, as long as there are any of each."""
    seen: Counter[str] = Counter()
    numbers = []
    for row in rows:
        numbers.append(seen[row["label"]])
        seen[row["label"]] += 1
    return [row for _, row in sorted(zip(numbers, rows, strict=True), key=lambda pair: pair[0])]


def write_data(data: Path, work: Path) -> None:
    """base.csv without the digit, digit.csv with it alone, train.csv with all."""
    rows = read_rows(data / "train.csv")
    write_csv(rows[: COUNTS["train"]], data, work / "train.csv")
    others = [row for row in rows if row["label"] != DIGIT]
    chosen = [row for row in rows if row["label"] == DIGIT][: COUNTS["digit"]]
    write_csv(others[: COUNTS["base"]], data, work / "base.csv")
    write_csv(chosen, data, work / "digit.csv", shots=SHOTS)


def enlarge(tokenizer: Path, target: Path) -> None:
    """The same tokenizer for images of LARGE x LARGE pixels, so that its grids are larger."""
    shutil.copytree(tokenizer / "best", target)
    (target / "sha256.json").unlink()
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"image_size": [LARGE, LARGE]}))


def bits_of(folder: Path) -> float:
    """The best validation bits per token of a training."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    return min(x["val/bits_per_token"] for x in lines if "val/bits_per_token" in x)


def train_row(name: str, command: str, **values: object) -> dict[str, float]:
    """Train a GPT in a folder of this name: its bits per token and seconds."""
    start = time.perf_counter()
    call(f"{{work}}/{name}", command, **values)
    seconds = time.perf_counter() - start
    return {"bits_per_token": bits_of(Path(f"{values['work']}/{name}")), "seconds": seconds}


def label_agreement(
    name: str, tokenizer: object, train: Path, work: Path, scale: float = 1.5, side: int = 28
) -> dict[str, float]:
    """Of all guided samples of a GPT, in percent, and half the width of its interval.

    The classifier is trained on the images of the CSV `train`, at `side` pixels. The keys are
    `agreement_key(scale)`, and the same with `SPREAD`.
    """
    samples, images = f"{work}/{name}-samples", f"{work}/{name}-images"
    sample = f"transformer_generation.py --model_path {work}/{name} --num_images {SAMPLES}"
    call(samples, f"{sample} --guidance_scale {scale}")
    decode = f"vqvae/images_from_indexes.py --indexes_path {samples} --model_dir {tokenizer}"
    call(images, decode)
    settings = Settings(torch.device("cpu"), 250, 0)
    sampled = ImageSet.whole(ImageDataset(f"{images}/images.csv"))
    real = ImageDataset(train, size=(side, side), channels=sampled.images.channels)
    network = features.train_classifier(ImageSet.whole(real), str(train), settings)
    found = features.extract_features(network, sampled, settings, "samples")
    targets = features.class_targets(network, sampled.rows, images)
    weights = resample(len(sampled.rows), 0)
    estimate = features.label_agreement(found, targets, weights)
    key = agreement_key(scale)
    return {key: 100 * estimate.value, key + SPREAD: 100 * WIDTH * estimate.standard_error}


def agreement_key(scale: float) -> str:
    return f"label agreement, guidance {scale}"


def show(title: str, shares: dict[str, str], results: dict[str, dict[str, float]]) -> None:
    """The table; `shares` has the title of each column in percent by its key in the results."""
    print(f"\n| {title} | bits per token | {' | '.join(shares.values())} | s |")
    print("|---|---|---|" + "---|" * len(shares))
    for name, x in results.items():
        shares_of = " | ".join(f"{x[key]:.1f} ± {x[key + SPREAD]:.1f}" for key in shares)
        print(f"| {name} | {x['bits_per_token']:.3f} | {shares_of} | {x['seconds']:.0f} |")


def tune_to_emoji(flags: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """A GPT of CIFAR-10, tuned to the emoji by the tokenizer of CIFAR-10."""
    rows = in_turn(read_rows(Path(flags.data) / "train.csv"))[: flags.shots + VALIDATION]
    write_csv(rows, Path(flags.data), work / "emoji.csv", shots=flags.shots)
    quantize = "quantize_dataset.py --model_dir {model_dir} --path_to_data {work}/emoji.csv"
    call("{work}/emoji", quantize, work=work, model_dir=flags.model_dir)
    results: dict[str, dict[str, float]] = {}
    for number, (name, command) in enumerate(EMOJI_ROWS.items()):
        values = {"work": work, "model_path": flags.model_path, "steps": flags.steps}
        folder = f"gpt{number}"
        results[name] = train_row(folder, f"{EMOJI} {command}", **values)
        for scale in EMOJI_SCALES:
            given = folder, flags.model_dir, Path(flags.data) / "train.csv", work, scale, 32
            results[name] |= label_agreement(*given)
    scales = {agreement_key(scale): f"right at {scale}, %" for scale in EMOJI_SCALES}
    show(f"{flags.steps} steps on {flags.shots} emoji", scales, results)
    return results


def tune_to_digit(flags: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """A GPT of MNIST without a digit, tuned to it, and to larger grids."""
    write_data(Path(flags.data), work)
    quantize = "quantize_dataset.py --model_dir {work}/{tokenizer} --path_to_data {work}/{data}.csv"
    tokenizer = "train_vqvae.py --path_to_data {work}/base.csv --max_steps 1200 --batch_size 64"
    tokenizer += " --patch_size 7 --channel_multipliers 1 --codebook_size 256 --learning_rate 4e-3"
    tokenizer += " --evaluate_every 400"
    call("{work}/tokenizer", tokenizer, work=work)
    for name in ("base", "digit"):
        call(f"{{work}}/{name}", quantize, work=work, data=name, tokenizer="tokenizer")
    base = f"{TRAIN} {SHAPE} --max_steps 1000 --evaluate_every 250 --optimizer muon"
    call("{work}/gpt", f"{base} --learning_rate 4e-3", work=work, data="base")
    results: dict[str, dict[str, float]] = {}
    for number, (name, command) in enumerate(ROWS.items()):
        folder = f"gpt{number}"
        results[name] = train_row(folder, f"{TRAIN} {command}", work=work, data="digit")
        given = folder, work / "tokenizer", work / "train.csv", work
        results[name] |= label_agreement(*given)
    show(f"{SHOTS} images of {DIGIT}", {agreement_key(1.5): f"classified as {DIGIT}, %"}, results)
    enlarge(work / "tokenizer", work / "large")
    call("{work}/digit-large", quantize, work=work, data="digit", tokenizer="large")
    print(f"\n| the same at {LARGE} pixels | bits per token |\n|---|---|")
    for number, (name, command) in enumerate(GRIDS.items(), len(ROWS)):
        values = {"work": work, "data": "digit-large"}
        results[f"{LARGE} pixels, {name}"] = x = train_row(
            f"gpt{number}", f"{TRAIN} {command}", **values
        )
        print(f"| {name} | {x['bits_per_token']:.3f} |")
    return results


PARTS = {"digit": tune_to_digit, "emoji": tune_to_emoji}


def main(flags: argparse.Namespace) -> None:
    work = Path(flags.work_dir)
    shutil.rmtree(work, ignore_errors=True)
    results = PARTS[flags.part](flags, work)
    used, name = os.times(), flags.part
    if name == "emoji":
        name = f"{flags.shots} emoji, {flags.steps} steps"
    print(f"\n{used.children_user + used.children_system:.0f} s of CPU time")
    print(f"written: {record.merge('fine_tuning', {name: results})}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--part", default="digit", choices=tuple(PARTS), help="what is tuned (default: digit)")
    add("--data", default="data/mnist", help="folder of train.csv")
    add("--model_path", default="", help="GPT of CIFAR-10, for the emoji")
    add("--model_dir", default="", help="its tokenizer")
    add("--shots", type=cli.positive, default=300, help="emoji to train on")
    add("--steps", type=cli.positive, default=120, help="of a training on emoji")
    add("--work_dir", default="outputs/fine-tuning", help="where to work")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
