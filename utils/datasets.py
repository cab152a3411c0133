"""Public data sets as PNG files and a CSV, for `python -m utils.datasets`."""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from utils import cli

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


def write_csv(folder: Path, name: str, images: Iterable[tuple[Any, str]], total: int) -> None:
    """Write images (anything Pillow saves, label) under folder/name/ and their CSV beside it."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "label"])
        for number, (image, label) in enumerate(
            tqdm(images, total=total, desc=name, unit=" images", disable=None)
        ):
            path = f"{name}/{number:05}.png"
            image.save(folder / path)
            writer.writerow([path, label])


def write_download(name: str, folder: Path) -> None:
    """Download a data set with torchvision and write train.csv and test.csv.

    Raises:
        UserError: it cannot be downloaded.
    """
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
        images = ((image, dataset.classes[label].split(" - ")[0]) for image, label in dataset)
        write_csv(folder, split, images, len(dataset))


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 digits of 8x8 pixels and digits.csv, which says the split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    with (folder / "digits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "label", "split"])
        for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            path = f"digits/{number:04}.png"
            Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)).save(folder / path)
            split = "val" if number % DIGITS_HELD_OUT == 0 else "train"
            writer.writerow([path, label, split])


def write_pairs(folder: Path) -> None:
    """Write the digits and each of them shrunk to 4x4 pixels: pairs.csv of both, low.csv."""
    write_digits(folder)
    (folder / "low").mkdir(exist_ok=True)
    rows = pd.read_csv(folder / "digits.csv", dtype=str)
    rows["condition_path"] = rows["image_path"].str.replace("digits/", "low/")
    for image_path, condition_path in zip(rows["image_path"], rows["condition_path"], strict=True):
        with Image.open(folder / image_path) as image:
            image.reduce(2).save(folder / condition_path)
    rows.to_csv(folder / "pairs.csv", index=False)
    low = rows.drop(columns="image_path").rename(columns={"condition_path": "image_path"})
    low.to_csv(folder / "low.csv", index=False)


def write_photographs(folder: Path) -> None:
    """Write scikit-learn's two photographs in patches that overlap, and photographs.csv.

    The right end of each photograph is for validation: no training patch reaches into it.
    """
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images()
    (folder / "photographs").mkdir(parents=True, exist_ok=True)
    with (folder / "photographs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "label", "split"])
        for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
            image, label = Image.fromarray(pixels).reduce(SHRINK), Path(name).stem
            held_out = image.width - PATCH
            for top in range(0, image.height - PATCH + 1, STRIDE):
                for left in range(0, held_out + 1, STRIDE):
                    if held_out - PATCH < left < held_out:
                        continue
                    path = f"photographs/{label}-{top:03}-{left:03}.png"
                    image.crop((left, top, left + PATCH, top + PATCH)).save(folder / path)
                    writer.writerow([path, label, "val" if left == held_out else "train"])


# What comes with scikit-learn.
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
    parser = cli.make_parser(__doc__, prog="python -m utils.datasets")
    parser.add_argument(
        "name",
        choices=(*OFFLINE, *DOWNLOADS),
        help=" and ".join(OFFLINE) + " come with scikit-learn, offline",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the CSV and the images")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
