"""How guidance and filters change the samples of one GPT: Fréchet distance, labels, a picture.

    python -m benchmarks.guidance --model_path GPT --model_dir TOKENIZER --path_to_data INDICES

Each setting samples the labels of the validation images by the same random numbers. Distances are
to these images, decoded, in the features of a classifier that is trained on decoded training
images (see benchmarks/any_order.py). The picture has a row of each setting.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks import record
from benchmarks.any_order import Bench
from transformer import GPT, SamplingParams
from transformer.sampling import generate, generate_likeliest
from utils import cli, figures
from utils.data.vocabulary import read_vocabulary
from utils.provenance import load_model

# Each is flags of transformer_generation.py without the dashes.
SETTINGS = (
    *("", "temperature=0.5", "temperature=0.9", "temperature=1.2", "top_k=10", "top_p=0.9"),
    *("min_p=0.1", "typical_p=0.9", "guidance_scale=1.25", "guidance_scale=1.5"),
    *("guidance_scale=2", "guidance_scale=4", "guidance_scale=2 guidance_schedule=linear"),
    "guidance_scale=2 guidance_schedule=cosine",
    "guidance_scale=2 guidance_interval=0,0.5",
    "guidance_scale=2 guidance_interval=0.5,1",
    "guidance_scale=1.25 temperature=0.95",
    "guide_path=early guidance_scale=1.5",
    "candidates=4",
)
SHOWN, TEXT, SIDE = 16, 330, 40  # images of a row, pixels of its title and of an image
COLOURS = 64  # of the picture


def parse(words: str) -> tuple[SamplingParams, dict[str, str]]:
    """`name=value` words: the parameters of sampling, and those that are none."""
    values = dict(word.split("=", 1) for word in words.split())
    others = {name: values.pop(name) for name in ("guide_path", "candidates") if name in values}
    parser = cli.make_parser(None)
    cli.add_flags(parser, SamplingParams, "sampling")
    flags = parser.parse_args([f"--{name}={value}" for name, value in values.items()])
    return cli.read_flags(SamplingParams, flags), others


def sample(bench: Bench, flags: argparse.Namespace, model: GPT, words: str) -> Tensor:
    """Grids with the labels of the validation images."""
    params, others = parse(words)
    options: dict[str, Any] = {"params": params, "seed": flags.seed, "batch_size": 250}
    if "guide_path" in others:
        path = Path(flags.model_path, others["guide_path"])
        options["guide"] = load_model(str(path), GPT, bench.settings.device).model
    prefix = bench.prefix(model, labelled=True)
    if "candidates" in others:
        return generate_likeliest(model, prefix, candidates=int(others["candidates"]), **options)
    return generate(model, prefix, **options)


def row_of(bench: Bench, chosen: Tensor, grids: Tensor, title: str) -> Image.Image:
    """A title, and the images of some grids beside each other."""
    images = torch.cat(
        [*bench.decoded(grids[chosen]).batches([torch.arange(len(chosen))], torch.device("cpu"))]
    )
    row = Image.new("RGB", (TEXT + SHOWN * SIDE, SIDE), "white")
    font = ImageFont.load_default(15)
    ImageDraw.Draw(row).text((4, SIDE / 2), title or "no flags", "black", font, "lm")
    for number, image in enumerate(images):
        picture = figures.to_pil(image).convert("RGB").resize((SIDE - 2, SIDE - 2))
        row.paste(picture, (TEXT + number * SIDE, 1))
    return row


def main(flags: argparse.Namespace) -> None:
    bench = Bench(flags)
    model = load_model(flags.model_path, GPT, bench.settings.device).model
    names = read_vocabulary(Path(flags.model_path, "best")).class_names
    labels = [bench.data.rows[row].label for row in bench.rows.tolist()]
    # Of the classes in turn.
    places = [[n for n, label in enumerate(labels) if label == name] for name in names]
    chosen = torch.tensor([places[n % len(names)][n // len(names)] for n in range(SHOWN)])
    results, rows = {}, []
    for words in flags.settings:
        start = time.perf_counter()
        grids = sample(bench, flags, model, words)
        seconds, (distance, error) = time.perf_counter() - start, bench.distance(grids)
        agreement = 1 - bench.changed(grids)
        results[words] = {"fd": distance, "+-": error, "agreement": agreement, "seconds": seconds}
        print(f"| {words} | {distance:.3f} | {error:.3f} | {agreement:.1%} | {seconds:.0f} |")
        rows.append(row_of(bench, chosen, grids, " ".join(f"--{x}" for x in words.split())))
    if flags.picture:
        picture = Image.new("RGB", (rows[0].width, SIDE * len(rows)))
        for number, row in enumerate(rows):
            picture.paste(row, (0, number * SIDE))
        picture.quantize(COLOURS).save(flags.picture, optimize=True)
    print(record.merge("guidance", {Path(flags.path_to_data).name: results}))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.guidance")
    add = parser.add_argument
    add("--model_path", required=True, help="output folder of the GPT")
    add("--path_to_data", required=True, metavar="INDICES", help="what it was trained on")
    add("--model_dir", required=True, help="tokenizer of the indices")
    add("--settings", nargs="+", default=SETTINGS, metavar='"NAME=VALUE ..."', help="flags of each")
    add("--count", type=cli.positive, default=5000, help="validation images (default: 5000)")
    add("--picture", default="", metavar="PNG", help="where to draw the samples")
    add("--seed", type=int, default=0, help="of the samples and the classifier (default: 0)")
    add("--device", default="auto", help="where to compute")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
