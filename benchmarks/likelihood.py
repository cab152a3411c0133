"""Does `evaluate.py likelihood` find corrupted images? A mixture is made, ranked, and looked at.

Clean images of a CSV, others with 5 % of their pixels replaced at random, others inverted, and for
comparison others turned by 90 degrees: clean, but lying as no image of the training data does.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import record
from utils import cli, figures
from utils.data.images import ImageDataset

NOISE = 0.05  # share of the pixels that are replaced
KINDS = ("clean", "noisy", "inverted", "turned")


def noisy(images: Tensor, generator: torch.Generator, share: float = NOISE) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], a share of their pixels replaced by any values."""
    count, _, *size = images.shape
    hit = torch.rand(count, 1, *size, generator=generator) < share
    return torch.where(hit, torch.rand(images.shape, generator=generator) * 2 - 1, images)


def auroc(usual: Tensor, strange: Tensor) -> float:
    """The chance that one of `strange` (M,) is above one of `usual` (N,); ties count half."""
    ordered = usual.sort().values
    below = torch.searchsorted(ordered, strange) + torch.searchsorted(ordered, strange, right=True)
    return float(below.double().mean()) / (2 * len(usual))


def write_mixture(path_to_data: str, folder: Path, count: int) -> Path:
    """PNG files and mixture.csv of `count` images of each kind, their kind as the label."""
    dataset = ImageDataset(path_to_data)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(dataset), generator=generator)[: count * len(KINDS)]
    if len(rows) < count * len(KINDS):
        raise cli.UserError(
            f"{path_to_data} has {len(dataset)} images, but {count} of each of {len(KINDS)} kinds "
            "are needed; lower --count"
        )
    clean, plain, straight, upright = dataset.batches(rows.split(count), torch.device("cpu"))
    images = clean, noisy(plain, generator), -straight, upright.rot90(dims=(2, 3))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mixture.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "label"])
        for kind, group in zip(KINDS, images, strict=True):
            for number, image in enumerate(group):
                figures.to_pil(image).save(folder / f"{kind}-{number:05}.png")
                writer.writerow([f"{kind}-{number:05}.png", kind])
    return folder / "mixture.csv"


def main(flags: argparse.Namespace) -> None:
    output_dir = Path(flags.output_dir)
    mixture = write_mixture(flags.path_to_data, output_dir / "mixture", flags.count)
    models = ["--model_path", flags.model_path, "--model_dir", flags.model_dir]
    rank = ["evaluate.py", "likelihood", *models, "--unconditional", "--path_to_data", str(mixture)]
    subprocess.run([sys.executable, *rank, "--output_dir", str(output_dir)], check=True)
    with (output_dir / "likelihood.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    bits = {
        kind: torch.tensor([float(x["bits_per_token"]) for x in lines if x["label"] == kind])
        for kind in KINDS
    }
    corrupted = {"noisy or inverted": torch.cat([bits["noisy"], bits["inverted"]])}
    found = corrupted | {kind: bits[kind] for kind in KINDS[1:]}
    results = {kind: auroc(bits["clean"], values) for kind, values in found.items()}
    print(f"\n{flags.count} images of each kind, without labels\n")
    print("| against clean | AUROC |\n|---|---|")
    for kind, value in results.items():
        print(f"| {kind} | {value:.5f} |")
    means = {kind: float(values.mean()) for kind, values in bits.items()}
    print(f"\nwritten: {record.write('likelihood', {'auroc': results, 'bits_per_token': means})}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model_path", required=True, help="GPT: a folder, or runs:/...")
    parser.add_argument("--model_dir", required=True, help="tokenizer: a folder, or runs:/...")
    parser.add_argument("--path_to_data", required=True, metavar="CSV", help="CSV of clean images")
    parser.add_argument("--count", type=cli.positive, default=1000, help="images of each kind")
    parser.add_argument("--output_dir", default="outputs/likelihood", help="where to work")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
