"""Public data sets as PNG files and a CSV, for `python -m utils.data.download`."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from utils import cli
from utils.data.sources import Row
from utils.data.sources.csv import read_table, write_table
from utils.progress import ProgressBar

# name: (class in torchvision.datasets, address it downloads from)
DOWNLOADS = {
    "mnist": ("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "fashion-mnist": (
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    "cifar10": ("CIFAR10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
}
DIGITS_HELD_OUT = 5  # every fifth digit is for validation
PATCH, STRIDE, SHRINK = 32, 4, 4  # of patches, in pixels of photographs that are shrunk first

# The path and the label of an image, its split where the data set has one, and the image.
Item = tuple[str, str, str, Image.Image]


def write_images(folder: Path, name: str, items: Iterable[Item], total: int | None = None) -> None:
    """Write images as folder/name/*.png, and folder/name.csv."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for path, label, split, image in ProgressBar(items, name, total, unit=" images"):
        image.save(folder / name / path)
        rows.append((f"{name}/{path}", label, split))
    columns = ["image_path", "label", "split"] if rows[0][2] else ["image_path", "label"]
    write_table(folder / f"{name}.csv", columns, (row[: len(columns)] for row in rows))


def write_download(name: str, folder: Path) -> None:
    """Download a data set with torchvision and write train.csv and test.csv."""
    from torchvision import datasets

    class_name, address = DOWNLOADS[name]
    for split in ("train", "test"):
        try:
            dataset = getattr(datasets, class_name)(
                folder / "download", train=split == "train", download=True
            )
        except (RuntimeError, OSError) as error:
            raise cli.UserError(
                f"cannot download {name} from {address} ({error}); go online, or put torchvision's "
                f"files into {folder / 'download'}"
            ) from error
        items = (
            (f"{number:05}.png", dataset.classes[label].split(" - ")[0], "", image)
            for number, (image, label) in enumerate(dataset)
        )
        write_images(folder, split, items, len(dataset))


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 digits of 8x8 pixels and digits.csv, with a split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    items = (
        (
            f"{number:04}.png",
            str(label),
            "val" if number % DIGITS_HELD_OUT == 0 else "train",
            Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)),
        )
        for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True))
    )
    write_images(folder, "digits", items)


def write_pairs(folder: Path) -> None:
    """Write the digits and each of them shrunk to 4x4 pixels: pairs.csv of both, low.csv."""
    write_digits(folder)
    (folder / "low").mkdir(exist_ok=True)
    _, rows = read_table(folder / "digits.csv")
    pairs = [row._replace(condition_path=row.image_path.replace("digits/", "low/")) for row in rows]
    for row in pairs:
        with Image.open(folder / row.image_path) as image:
            image.reduce(2).save(folder / row.condition_path)
    write_table(folder / "pairs.csv", Row._fields, pairs)
    low = [(row.condition_path, row.label, row.split) for row in pairs]
    write_table(folder / "low.csv", Row._fields[:3], low)


def write_photographs(folder: Path) -> None:
    """Write scikit-learn's two photographs in overlapping patches, and photographs.csv.

    The right end of each photograph is for validation: no training patch overlaps it.
    """
    from sklearn.datasets import load_sample_images

    write_images(folder, "photographs", _patches(load_sample_images()))


def _patches(photographs: dict) -> Iterator[Item]:
    for name, pixels in zip(photographs["filenames"], photographs["images"], strict=True):
        image, label = Image.fromarray(pixels).reduce(SHRINK), Path(name).stem
        held_out = image.width - PATCH
        for top in range(0, image.height - PATCH + 1, STRIDE):
            for left in range(0, held_out + 1, STRIDE):
                if not held_out - PATCH < left < held_out:
                    split = "val" if left == held_out else "train"
                    patch = image.crop((left, top, left + PATCH, top + PATCH))
                    yield f"{label}-{top:03}-{left:03}.png", label, split, patch


# The data sets that come with scikit-learn.
OFFLINE = {"digits": write_digits, "pairs": write_pairs, "photographs": write_photographs}


def main(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.output_dir)
    if arguments.name in OFFLINE:
        OFFLINE[arguments.name](folder)
        written = [f"{arguments.name}.csv"]
    else:
        write_download(arguments.name, folder)
        written = ["train.csv", "test.csv"]
    print("written: " + ", ".join(str(folder / name) for name in written))
    print(cli.next_command("train_vqvae.py", "--path_to_data", folder / written[0]))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.data.download")
    parser.add_argument(
        "name",
        choices=(*OFFLINE, *DOWNLOADS),
        help=" and ".join(OFFLINE) + " come with scikit-learn, offline",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the CSV and the images")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
