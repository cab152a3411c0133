"""How good are a tokenizer's reconstructions and a GPT's samples, and how usual is an image?"""

import argparse
import csv
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from transformer import GPT, GPTConfig, make_prefix
from utils import checkpoint, cli, figures, metrics, processes, tracking
from utils.images import ImageDataset
from utils.table import epoch_order
from utils.vocabulary import Vocabulary, read_vocabulary
from vqvae import VQVAE, VQVAEConfig

SHOWN = 50  # of the most usual images, and as many of the strangest
CLASSIFIER_EPOCHS, CLASSIFIER_BATCH, CLASSIFIER_RATE = 3, 128, 4e-3


def reconstruction_metrics(
    model: VQVAE, dataset: ImageDataset, batch_size: int, device: torch.device
) -> dict[str, float]:
    """MSE (on [0, 1]) and PSNR of the reconstructions of all images; health of the codebook."""
    counts = torch.zeros(model.config.num_codes, device=device)
    error = torch.zeros((), device=device)
    batches = torch.arange(len(dataset)).split(batch_size)
    with torch.inference_mode(), tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for images in dataset.batches(batches, device):
            indices = model.encode(images)
            error += metrics.squared_error(images, model.decode(indices)).sum()
            counts += model.quantizer.count(indices)
            bar.update(len(images))
    mse = float(error) / len(dataset)
    return {"mse": mse, "psnr": metrics.psnr(mse), **metrics.codebook_metrics(counts)}


def make_classifier(channels: int, num_classes: int) -> nn.Sequential:
    """A small convolutional network for images of any size from 8x8 on."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3)),
        nn.Linear(128 * 16, num_classes),
    )


def train_classifier(
    dataset: ImageDataset, targets: Tensor, num_classes: int, device: torch.device, seed: int
) -> nn.Module:
    """Fit the classifier to all images of a data set and their classes (N,)."""
    torch.manual_seed(seed)
    model = make_classifier(dataset.channels, num_classes).to(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    batch_size = min(CLASSIFIER_BATCH, len(dataset))
    steps = len(dataset) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, CLASSIFIER_RATE, total_steps=steps * CLASSIFIER_EPOCHS
    )
    with tqdm(total=steps * CLASSIFIER_EPOCHS, desc="classifier", disable=None) as bar:
        for epoch in range(CLASSIFIER_EPOCHS):
            order = epoch_order(torch.arange(len(dataset)), seed, epoch).split(batch_size)[:steps]
            for rows, images in zip(order, dataset.batches(order, device), strict=True):
                loss = F.cross_entropy(model(images), targets[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


@torch.inference_mode()
def accuracy(
    model: nn.Module, dataset: ImageDataset, targets: Tensor, device: torch.device
) -> float:
    """The share of the images that a classifier names right."""
    batches = torch.arange(len(dataset)).split(500)
    right = 0
    for rows, images in zip(batches, dataset.batches(batches, device), strict=True):
        right += int((model(images).argmax(dim=1).cpu() == targets[rows]).sum())
    return right / len(dataset)


def classes_of(dataset: ImageDataset, names: list[str] | None = None) -> tuple[Tensor, list[str]]:
    """The class of each image of a data set (N,), and the classes' names.

    Raises:
        UserError: images without a label, or with one that is not among `names`.
    """
    labels = [row.label for row in dataset.rows]
    if not all(labels):
        raise cli.UserError(
            f"{dataset.path}: {labels.count('')} of {len(labels)} images have no label; a column "
            "label is needed here"
        )
    names = sorted(set(labels)) if names is None else names
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise cli.UserError(
            f"{dataset.path} has the labels {cli.first_few(unknown)}, which the classifier was "
            "not taught; give data of the same classes"
        )
    return torch.tensor([names.index(label) for label in labels]), names


def report(output_dir: Path, name: str, values: dict) -> None:
    """Print the figures and write them to a JSON file."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{name}.json"
    path.write_text(json.dumps({**values, "made_by": cli.command_line()}, indent=2) + "\n")
    for key, value in values.items():
        print(f"{key:>24}  {value:.6g}" if isinstance(value, float) else f"{key:>24}  {value}")
    print(f"written to {path}")


def evaluate_reconstructions(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    tokenizer = checkpoint.load_model(
        tracking.fetch(arguments.model_dir), VQVAE, VQVAEConfig, device
    )
    config = tokenizer.model.config
    dataset = ImageDataset(
        arguments.path_to_data, size=config.image_size, channels=config.in_channels
    )
    print(dataset)
    output_dir = Path(arguments.output_dir or tokenizer.home / "evaluation")
    values = reconstruction_metrics(tokenizer.model, dataset, arguments.batch_size, device)
    report(output_dir, "reconstructions", {"images": len(dataset), **values})
    run = tracking.continue_run(output_dir, arguments.run_id, tokenizer.provenance.run_id)
    with run:
        run.metrics(Path(arguments.path_to_data).stem, values, 0)


def evaluate_samples(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    images = Path(arguments.images)
    real = ImageDataset(arguments.path_to_data)
    size = {"size": real.size, "channels": real.channels}
    test = ImageDataset(arguments.path_to_test, **size)
    samples = ImageDataset(images / "images.csv" if images.is_dir() else images, **size)
    targets, names = classes_of(real)
    test_targets, _ = classes_of(test, names)
    sample_targets, _ = classes_of(samples, names)
    classifier = train_classifier(real, targets, len(names), device, arguments.seed)
    values = {
        "classifier_test_accuracy": accuracy(classifier, test, test_targets, device),
        "label_agreement": accuracy(classifier, samples, sample_targets, device),
    }
    output_dir = Path(arguments.output_dir or samples.path.parent.parent / "evaluation")
    report(output_dir, "samples", {"images": len(samples), **values})


@torch.inference_mode()
def bits_of_images(
    tokenizer: VQVAE, gpt: GPT, dataset: ImageDataset, prefix: Tensor, batch_size: int
) -> Tensor:
    """What the indices of each image cost under the GPT, (N,), in bits per token."""
    device = gpt.head.weight.device
    batches = torch.arange(len(dataset)).split(batch_size)
    bits = []
    with tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for rows, images in zip(batches, dataset.batches(batches, device), strict=True):
            nats = gpt(prefix[rows].to(device), tokenizer.encode(images), loss=True)
            bits.append(nats.double().mean(dim=1).cpu() / math.log(2))
            bar.update(len(rows))
    return torch.cat(bits)


@torch.inference_mode()
def read_conditions(
    arguments: argparse.Namespace, vocabulary: Vocabulary, device: torch.device
) -> Tensor | None:
    """The conditions of a CSV's images, (N, hc, wc); None for a GPT that takes none.

    Raises:
        UserError: no tokenizer for them, another one, or one that is of no use.
    """
    address, told = arguments.condition_model_dir, f"the GPT in {arguments.model_path} is told"
    if vocabulary.condition is None and address:
        raise cli.UserError(f"{told} no conditions; leave --condition_model_dir away")
    if vocabulary.condition is None:
        return None
    if not address:
        raise cli.UserError(
            f"{told} conditions; give their tokenizer by --condition_model_dir, and their pictures "
            "in a column condition_path"
        )
    tokenizer = checkpoint.load_model(tracking.fetch(address), VQVAE, VQVAEConfig, device)
    vocabulary.condition.check_tokenizer(tokenizer, f"the condition of {arguments.model_path}")
    config = tokenizer.model.config
    pictures = ImageDataset(
        arguments.path_to_data,
        column="condition_path",
        size=config.image_size,
        channels=config.in_channels,
    )
    batches = torch.arange(len(pictures)).split(arguments.batch_size)
    return torch.cat([tokenizer.model.encode(x).cpu() for x in pictures.batches(batches, device)])


def evaluate_likelihood(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    gpt = checkpoint.load_model(tracking.fetch(arguments.model_path), GPT, GPTConfig, device)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    tokenizer = checkpoint.load_model(
        tracking.fetch(arguments.model_dir), VQVAE, VQVAEConfig, device
    )
    if vocabulary.tokenizer_sha256 not in ("", tokenizer.sha256):
        raise cli.UserError(
            f"the GPT in {gpt.folder} belongs to the tokenizer {vocabulary.tokenizer_sha256[:12]}, "
            f"but {tokenizer.folder} is {tokenizer.sha256[:12]}; use models of one tokenizer"
        )
    config = tokenizer.model.config
    dataset = ImageDataset(
        arguments.path_to_data, size=config.image_size, channels=config.in_channels
    )
    print(dataset)
    labels = [""] * len(dataset) if arguments.unconditional else [r.label for r in dataset.rows]
    conditions = read_conditions(arguments, vocabulary, device)
    prefix = make_prefix(torch.tensor(vocabulary.tokens(labels)), conditions)
    bits = bits_of_images(tokenizer.model, gpt.model, dataset, prefix, arguments.batch_size)

    order = bits.argsort(stable=True)
    output_dir = Path(arguments.output_dir or gpt.home / "evaluation")
    tokens_per_pixel = config.depth * math.prod(config.latent_dim) / math.prod(config.image_size)
    values = {
        "bits_per_token": float(bits.mean()),
        "bits_per_pixel": float(bits.mean()) * tokens_per_pixel,
        "most_usual": float(bits.min()),
        "strangest": float(bits.max()),
    }
    report(output_dir, "likelihood", {"images": len(dataset), **values})
    with (output_dir / "likelihood.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "label", "bits_per_token"])
        for row in order.tolist():
            line = dataset.rows[row]
            writer.writerow([line.image_path, line.label, f"{float(bits[row]):.4f}"])
    ends = [order[:SHOWN], order[-SHOWN:].flip(0)]
    usual, strange = (figures.grid(images) for images in dataset.batches(ends, device))
    usual.save(output_dir / "most_usual.png")
    strange.save(output_dir / "strangest.png")
    print(f"from usual to strange in {output_dir / 'likelihood.csv'}, both ends beside it as PNG")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="reconstructions | samples | likelihood"
    )
    one = commands.add_parser("reconstructions", help="error of a tokenizer on the images of a CSV")
    one.set_defaults(evaluate=evaluate_reconstructions)
    one.add_argument("--model_dir", required=True, help="tokenizer: a folder, or runs:/...")
    one.add_argument("--path_to_data", required=True, metavar="CSV", help="CSV of images")
    one.add_argument("--run_id", help="MLflow run to log to (default: the tokenizer's)")
    two = commands.add_parser("samples", help="do samples show what their label says?")
    two.set_defaults(evaluate=evaluate_samples)
    two.add_argument("--images", required=True, help="folder of images_from_indexes.py, or a CSV")
    two.add_argument(
        "--path_to_data", required=True, metavar="CSV", help="real images that teach a classifier"
    )
    two.add_argument(
        "--path_to_test", required=True, metavar="CSV", help="real images that examine it"
    )
    two.add_argument("--seed", type=int, default=0, help="of the classifier (default: 0)")
    three = commands.add_parser("likelihood", help="rank images from usual to strange")
    three.set_defaults(evaluate=evaluate_likelihood)
    three.add_argument("--model_path", required=True, help="GPT: a folder, or runs:/...")
    three.add_argument("--model_dir", required=True, help="tokenizer: a folder, or runs:/...")
    three.add_argument("--path_to_data", required=True, metavar="CSV", help="CSV of images")
    three.add_argument(
        "--condition_model_dir", help="tokenizer of the pictures in the column condition_path"
    )
    three.add_argument(
        "--unconditional", action="store_true", help="do not tell the GPT the images' labels"
    )
    for command in (one, two, three):
        command.add_argument("--output_dir", help="where the JSON goes (default: evaluation/)")
        cli.add_inference_flags(command, batch_size=256)
    return parser


if __name__ == "__main__":
    cli.run(lambda arguments: arguments.evaluate(arguments), make_parser())
