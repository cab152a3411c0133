"""Public data sets as PNG files and a CSV, for `python -m utils.data.download`."""

import argparse
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

# The path and the label of an image, its split where the data set has one, and the image.
Item = tuple[str, str, str, Image.Image]


def write_images(folder: Path, name: str, items: Iterable[Item], total: int | None = None) -> None:
    """Write images as folder/name/*.png, and folder/name.csv."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for path, label, split, image in ProgressBar(items, name, total, unit=" images"):
        image.save(folder / name / path)
        rows.append((f"{name}/{path}", label, split))
    columns = Row._fields[:3] if rows[0][2] else Row._fields[:2]
    write_table(folder / f"{name}.csv", columns, (row[: len(columns)] for row in rows))


def write_download(name: str, folder: Path) -> None:
    """Download a data set with torchvision and write train.csv and test.csv."""
    from torchvision import datasets

    class_name, address = DOWNLOADS[name]
    make, cache = getattr(datasets, class_name), folder / "download"
    for split in ("train", "test"):
        try:
            dataset = make(cache, train=split == "train", download=True)
        except (RuntimeError, OSError) as error:
            raise cli.UserError(
                f"cannot download {name} from {address} ({error}); go online, or put torchvision's "
                f"files into {cache}"
            ) from error
        items = (
            (f"{number:05}.png", dataset.classes[label].split(" - ")[0], "", image)
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
        yield f"{number:04}.png", str(label), split, image


def write_pairs(folder: Path) -> None:
    """Write the digits and each of them shrunk to 4x4 pixels: pairs.csv of both, low.csv."""
    items = list(digits())
    write_images(folder, "digits", items)
    write_images(folder, "low", ((a, b, c, image.reduce(2)) for a, b, c, image in items))
    pairs = [(f"digits/{name}", label, split, f"low/{name}") for name, label, split, _ in items]
    write_table(folder / "pairs.csv", Row._fields[:4], pairs)


def main(arguments: argparse.Namespace) -> None:
    folder, name = Path(arguments.output_dir), arguments.name
    if name == "pairs":
        write_pairs(folder)
    elif name in OFFLINE:
        write_images(folder, name, digits())
    else:
        write_download(name, folder)
    written = [f"{name}.csv"] if name in OFFLINE else ["train.csv", "test.csv"]
    print("written: " + ", ".join(str(folder / file) for file in written))
    print(cli.next_command("train_vqvae.py", "--path_to_data", folder / written[0]))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.data.download")
    offline = ", ".join(OFFLINE) + " come with scikit-learn, offline"
    parser.add_argument("name", choices=(*OFFLINE, *DOWNLOADS), help=offline)
    parser.add_argument("--output_dir", required=True, help="folder for the CSV and the images")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
