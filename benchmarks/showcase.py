"""The figures and pictures of docs/transformer.md, by the scripts as a user calls them.

Completion, guidance and likelihood take the tokenizer and the GPT of the README's MNIST commands;
the panorama trains its own on patches of two photographs.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from benchmarks import record
from utils import cli
from utils.data import download
from utils.data.sources import Row

PARTS = ("mnist", "panorama")
OUTPUT = Path("outputs/showcase")
GAP = 4  # pixels between strips
SAMPLE = "transformer_generation.py --model_path {model_path} --num_images 1000"
COMPLETE = SAMPLE + " --model_dir {model_dir} --complete {work}/test --mask top:0.5"
SAMPLED = {  # folder: how it is sampled
    "completed": COMPLETE,
    "completed-without-labels": COMPLETE + " --unconditional",
    "sampled": SAMPLE,
    "sampled-guided": SAMPLE + " --guidance_scale 2",
}
TEST = (
    "quantize_dataset.py --model_dir {model_dir} --path_to_data {data}/test.csv "
    "--output_dir {work}/test"
)
DECODE = "vqvae/images_from_indexes.py --indexes_path {work}/{name} --model_dir {model_dir}"
EVALUATE = (
    "evaluate.py samples --images {work}/{name}-images --path_to_data {data}/train.csv "
    "--path_to_test {data}/test.csv"
)
LIKELIHOOD = (
    "-m benchmarks.likelihood --model_path {model_path} --model_dir {model_dir} "
    "--path_to_data {data}/test.csv"
)
PHOTOGRAPHS = "data/photographs/photographs.csv"
PATCH, STRIDE, SHRINK = 32, 4, 4  # of patches, in pixels of photographs that are shrunk first
PANORAMA = (  # folder: what makes it
    (
        "{work}/tokenizer",
        f"train_vqvae.py --path_to_data {PHOTOGRAPHS} --batch_size 16 --learning_rate 2e-3 "
        "--max_epochs 30 --evaluate_every 590",
    ),
    (
        "{work}/indices",
        f"quantize_dataset.py --model_dir {{work}}/tokenizer --flip --path_to_data {PHOTOGRAPHS}",
    ),
    (
        "{work}/gpt",
        "train.py --path_to_data {work}/indices --model_dir {work}/tokenizer --window_size 5 "
        "--dim 128 --batch_size 32 --max_epochs 40 --evaluate_every 145 --patience 1 "
        "--optimizer muon",
    ),
    (
        "{work}/strips",
        "transformer_generation.py --model_path {work}/gpt --latent_dim 16,96 "
        "--num_images 4 --temperature 0.9 --top_p 0.95",
    ),
    (
        "{work}/images",
        "vqvae/images_from_indexes.py --indexes_path {work}/strips --model_dir {work}/tokenizer",
    ),
)


def photographs() -> Iterator[download.Item]:
    """scikit-learn's two photographs in overlapping patches.

    The right end of each photograph is for validation: no training patch overlaps it.
    """
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    for name, pixels in zip(found.filenames, found.images, strict=True):
        image, label = Image.fromarray(pixels).reduce(SHRINK), Path(name).stem
        held_out = image.width - PATCH
        for top in range(0, image.height - PATCH + 1, STRIDE):
            for left in range(0, held_out + 1, STRIDE):
                if not held_out - PATCH < left < held_out:
                    split = "val" if left == held_out else "train"
                    patch = image.crop((left, top, left + PATCH, top + PATCH))
                    yield Row(f"{label}-{top:03}-{left:03}.png", label, split), patch


def call(output_dir: str, command: str, **values: object) -> None:
    """Run a script, shown as it is typed.

    Raises:
        UserError: it failed.
    """
    command = f"{command} --output_dir {output_dir}".format(**values)
    print(f"\n$ python {command}", flush=True)
    code = subprocess.run([sys.executable, *shlex.split(command)], check=False).returncode
    if code:
        raise cli.UserError(f"the step above failed with exit code {code}")


def label_agreements(**values: object) -> dict[str, float]:
    """The share of each set of images in which a classifier sees the label, in percent."""
    call("{work}/test", TEST, **values)
    agreements = {}
    for name, command in SAMPLED.items():
        call(f"{{work}}/{name}", command, **values)
        call(f"{{work}}/{name}-images", DECODE, name=name, **values)
        call(f"{{work}}/{name}-evaluated", EVALUATE, name=name, **values)
        found = json.loads(Path(f"{values['work']}/{name}-evaluated/samples.json").read_text())
        agreements[name] = 100 * found["metrics"]["label_agreement"]["value"]
    return agreements


def stack(paths: list[Path]) -> Image.Image:
    """Pictures of one size below each other."""
    pictures = [Image.open(path) for path in paths]
    width, height = pictures[0].size
    canvas = Image.new(pictures[0].mode, (width, len(pictures) * (height + GAP) - GAP), "white")
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (0, number * (height + GAP)))
    return canvas


def main(flags: argparse.Namespace) -> None:
    start, pictures = time.perf_counter(), Path(flags.pictures_dir)
    pictures.mkdir(parents=True, exist_ok=True)
    for part in flags.parts:
        work = OUTPUT / part
        shutil.rmtree(work, ignore_errors=True)
        if part == "panorama":
            path = Path(PHOTOGRAPHS)
            download.write_images(path.parent, path.stem, photographs())
            for folder, command in PANORAMA:
                call(folder, command, work=work)
            stack(sorted((work / "images").glob("[0-9]*.png"))).save(pictures / "panorama.png")
            continue
        values = {name: getattr(flags, name) for name in ("model_path", "model_dir", "data")}
        agreements = label_agreements(work=work, **values)
        shutil.copy(work / "completed" / "completions.png", pictures)
        call("{work}/likelihood", LIKELIHOOD, work=work, **values)
        print("\n| 1,000 images | show their label, % |\n|---|---|")
        for name, value in agreements.items():
            print(f"| {name.replace('-', ' ')} | {value:.1f} |")
        print(f"\nwritten: {record.write('showcase', agreements)}")
    print(f"pictures in {pictures}; {time.perf_counter() - start:.0f} s")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="which (default: all)"
    )
    parser.add_argument("--model_dir", default="outputs/mnist/tokenizer", help="MNIST tokenizer")
    parser.add_argument("--model_path", default="outputs/mnist/gpt", help="MNIST GPT")
    parser.add_argument("--data", default="data/mnist", help="folder of train.csv and test.csv")
    parser.add_argument("--pictures_dir", default="readme_images", help="where pictures go")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
