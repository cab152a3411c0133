"""Public data sets as PNG files and a CSV, for `python -m utils.data.download`."""

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from utils import cli
from utils.data.sources import Row
from utils.data.sources.csv import write_table
from utils.progress import ProgressBar

DOWNLOADS = {  # the class in torchvision.datasets, and the address that it downloads from
    "mnist": ("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist"),
    "fashion-mnist": ("FashionMNIST", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
    "cifar10": ("CIFAR10", "https://www.cs.toronto.edu/~kriz"),
}
OFFLINE = ("digits", "pairs")
DIGITS_HELD_OUT = 5  # every fifth digit is for validation
EMOJI_HELD_OUT = 10  # every tenth emoji is in test.csv
EMOJI = "emoji-datasource-google-16.0.0"  # an npm package of the images of Noto Emoji
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # from U+1F3FB on
Item = tuple[Row, Image.Image]  # with the name that the file of the image gets


def write_images(folder: Path, name: str, items: Iterable[Item], total: int | None = None) -> None:
    """Write images as folder/name/*.png, and folder/name.csv."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for row, image in ProgressBar(items, name, total, unit=" images"):
        image.save(folder / name / row.image_path)
        rows.append(row._replace(image_path=f"{name}/{row.image_path}"))
    columns = [column for column in Row._fields if getattr(rows[0], column)]
    values = ([getattr(row, column) for column in columns] for row in rows)
    write_table(folder / f"{name}.csv", columns, values)


def write_download(name: str, folder: Path) -> None:
    """Download a data set with torchvision and write train.csv and test.csv."""
    from torchvision import datasets

    class_name, address = DOWNLOADS[name]
    make, cache = getattr(datasets, class_name), folder / "download"
    text = f"cannot download {name} from {address} (%s); go online, or put torchvision's files "
    for split in ("train", "test"):
        with cli.user_error(f"{text}into {cache}", RuntimeError, OSError):
            dataset = make(cache, train=split == "train", download=True)
        items = (
            (Row(f"{number:05}.png", dataset.classes[label].split(" - ")[0], ""), image)
            for number, (image, label) in enumerate(dataset)
        )
        write_images(folder, split, items, len(dataset))


def digits() -> Iterator[Item]:
    """scikit-learn's 1,797 digits of 8x8 pixels, with a split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        split = "val" if number % DIGITS_HELD_OUT == 0 else "train"
        image = Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8))
        yield Row(f"{number:04}.png", str(label), split), image


def emoji(package: Path) -> list[Item]:
    """The 3,786 emoji of 64x64 pixels of an npm package, with 10 classes and captions.

    A UserError for another file.
    """
    text = f"cannot read {package} (%s); download it there by npm pack "
    text += "emoji-datasource-google@16.0.0"
    kinds = OSError, EOFError, tarfile.TarError, KeyError, ValueError
    with cli.user_error(text, *kinds), tarfile.open(package) as archive:
        names = ("package/emoji.json", "package/img/google/64/")
        files = {
            Path(member.name).name: file.read()
            for member in archive
            if member.name.startswith(names) and (file := archive.extractfile(member))
        }
        described = json.loads(files.pop("emoji.json"))
    rows = []
    for one in described:
        name, label = one["name"].lower(), one["category"]
        rows.append(Row(one["image"], label, "", caption=name))
        for tones, variation in one.get("skin_variations", {}).items():
            points = [int(x, 16) for x in dict.fromkeys(tones.split("-"))]
            tone = " and ".join(SKIN_TONES[x - 0x1F3FB] for x in points)
            rows.append(Row(variation["image"], label, "", caption=f"{name}, {tone} skin tone"))
    return [(row, Image.open(io.BytesIO(files[row.image_path]))) for row in sorted(rows)]


def write_pairs(folder: Path) -> None:
    """Write the digits and each of them shrunk to 4x4 pixels: pairs.csv of both, low.csv."""
    items = list(digits())
    write_images(folder, "digits", items)
    write_images(folder, "low", ((row, image.reduce(2)) for row, image in items))
    pairs = [
        (f"digits/{row.image_path}", row.label, row.split, f"low/{row.image_path}")
        for row, _ in items
    ]
    write_table(folder / "pairs.csv", Row._fields[:4], pairs)


def main(arguments: argparse.Namespace) -> None:
    folder, name = Path(arguments.output_dir), arguments.name
    if name == "pairs":
        write_pairs(folder)
    elif name in OFFLINE:
        write_images(folder, name, digits())
    elif name == "emoji":
        items = emoji(folder / f"{EMOJI}.tgz")
        write_images(folder, "test", items[::EMOJI_HELD_OUT])
        del items[::EMOJI_HELD_OUT]
        write_images(folder, "train", items)
    else:
        write_download(name, folder)
    written = [f"{name}.csv"] if name in OFFLINE else ["train.csv", "test.csv"]
    print("written: " + ", ".join(str(folder / file) for file in written))
    print(cli.next_command("train_vqvae.py", "--path_to_data", folder / written[0]))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.data.download")
    offline = ", ".join(OFFLINE) + " come with scikit-learn, offline"
    parser.add_argument("name", choices=(*OFFLINE, *DOWNLOADS, "emoji"), help=offline)
    parser.add_argument("--output_dir", required=True, help="folder for the CSV and the images")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
