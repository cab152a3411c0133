"""Prompts: the share of images that obey a prompt whose combination of words is new.

Coloured shapes in relation to each other (tests/shapes.py): the training never shows a fifth of the
combinations. Tokenizer and GPT are trained on the others; a program checks colour, shape and
relation in images of the held-out ones, at several guidance scales. A second call goes on.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import record
from benchmarks.showcase import call
from tests import shapes
from utils import cli

TOKENIZER = (
    "train_vqvae.py --path_to_data {work}/data/shapes.csv --channels 32 --patch_size 4 "
    "--codebook_size 512 --codebook_dim 8 --learning_rate 4e-3 --resume auto "
    "--max_epochs {tokenizer_epochs}"
)
GPT = (
    "train.py --path_to_data {work}/indices --model_dir {work}/tokenizer --dim 128 --num_layers 4 "
    "--num_heads 4 --dropout 0 --optimizer muon --learning_rate 4e-3 --patience 0 --resume auto "
    "--max_epochs {gpt_epochs}"
)
SAMPLE = "transformer_generation.py --model_path {work}/gpt --prompt @{work}/prompts.txt "
DECODE = "vqvae/images_from_indexes.py --indexes_path {source} --model_dir {work}/tokenizer"


def share_of_obeying(folder: Path) -> float:
    """The share of the images in a folder that obey their caption."""
    known = {x.caption: x for x in shapes.combinations(held_out=True)}
    with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    found = []
    for row in rows:
        with Image.open(folder / row["image_path"]) as image:
            found.append(shapes.obeys(image, known[row["caption"]]))
    return float(np.mean(found))


def main(flags: argparse.Namespace) -> None:
    work, values, start = Path(flags.work_dir), vars(flags) | {"work": flags.work_dir}, time.time()
    if not (work / "data/shapes.csv").is_file():
        shapes.write_data(work / "data", flags.images, flags.seed)
    call(f"{work}/tokenizer", TOKENIZER, **values)
    if not (work / "indices").is_dir():
        quantize = "quantize_dataset.py --path_to_data {work}/data/shapes.csv"
        call(f"{work}/indices", f"{quantize} --model_dir {{work}}/tokenizer", **values)
    call(f"{work}/gpt", GPT, **values)
    minutes = (time.time() - start) / 60

    new = shapes.combinations(held_out=True)
    prompts = [new[number % len(new)].caption for number in range(flags.samples)]
    (work / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    results = {}
    for scale in flags.scales:
        folder = f"{work}/samples-{scale}"
        sample = f"{SAMPLE} --guidance_scale {scale} --num_images {flags.samples}"
        call(folder, f"{sample} --seed {flags.seed}", **values)
        call(f"{folder}-images", DECODE, source=folder, **values)
        results[str(scale)] = round(100 * share_of_obeying(Path(f"{folder}-images")), 1)
        print(f"guidance {scale}: {results[str(scale)]} % of {flags.samples} images obey")
    print("\n| guidance scale | images that obey a held-out prompt, % |\n|---|---|")
    for scale, share in results.items():
        print(f"| {scale} | {share} |")
    record.write("prompts", {"percent": results, "training minutes of this call": minutes})


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.prompts")
    add = parser.add_argument
    add("--work_dir", default="outputs/shapes", help="data, models and samples")
    add("--images", type=cli.positive, default=17_660, help="of the training")
    add("--tokenizer_epochs", type=cli.positive, default=5, help="of the tokenizer")
    add("--gpt_epochs", type=cli.positive, default=9, help="of the GPT")
    add("--samples", type=cli.positive, default=1000, help="at each scale")
    add("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0], help="of guidance")
    add("--seed", type=int, default=0, help="of data and samples")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
