"""How good are a tokenizer's reconstructions and a GPT's samples, and how usual is an image?"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from transformer import GPT, GPTConfig, make_prefix
from utils import checkpoint, cli, figures, processes, provenance, tracking
from utils.data.images import ImageDataset
from utils.data.indices import read_indices
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.evaluation import (
    bootstrap,
    comparison,
    features,
    parts,
    published,
    reconstruction_report,
    record,
    sample_report,
)
from utils.evaluation.decoded import DecodedImages
from utils.evaluation.parts import Part
from vqvae import VQVAE, VQVAEConfig
from vqvae.perceptual import BACKBONES, PerceptualLoss

SHOWN = 50  # of the most usual images, and as many of the strangest


def load_tokenizer(address: str, device: torch.device) -> checkpoint.LoadedModel:
    return checkpoint.load_model(tracking.fetch(address), VQVAE, VQVAEConfig, device)


def evaluate_reconstructions(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model_dir, device)
    config = tokenizer.model.config
    network = published.open_network(arguments.features, arguments.feature_weights, device)
    lpips = None
    if arguments.lpips:
        lpips = cli.build(PerceptualLoss, arguments.lpips, arguments.lpips_weights).to(device)
    dataset = parts.read_images(arguments.path_to_data, config.image_size, config.in_channels)
    output_dir = Path(arguments.output_dir or tokenizer.home / "evaluation")
    with tracking.continue_run(
        output_dir, arguments.run_id, tokenizer.provenance.run_id, homes=("tokenizer",)
    ) as run:
        if arguments.features == "classifier":
            path = arguments.path_to_train or arguments.path_to_data
            teaching = Part.whole(parts.read_images(path, dataset.size, dataset.channels))
            network = features.taught_network(*teaching, path, device, arguments.seed)
        found = reconstruction_report.report(
            *(tokenizer.model, dataset, network),
            lpips=lpips,
            device=device,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            protocol=record.protocol(arguments, dataset, network),
        )
        found.save(run, "reconstructions", f"evaluation/{Path(arguments.path_to_data).stem}")


def drawn_by(path: Path) -> str:
    """The run of the GPT that drew the images of a folder; "" where they do not say so."""
    grid = path / "grid.png"
    lineage = provenance.of_picture(grid) if grid.is_file() else ()
    return next((stage.run_id for stage in reversed(lineage) if stage.name == "samples"), "")


def read_samples(
    arguments: argparse.Namespace, tokenizer: checkpoint.LoadedModel | None
) -> tuple[Part, str, sample_report.Tokens | None]:
    """The samples, the run of the GPT that drew them ("" if not known), and their indices.

    Raises:
        UserError: neither images nor indices with their tokenizer, or both.
    """
    if bool(arguments.images) == bool(arguments.indexes_path):
        raise cli.UserError("give the samples by either --images or --indexes_path")
    if arguments.images:
        path = Path(arguments.images)
        run_id = drawn_by(path)
        path = path / "images.csv" if path.is_dir() else path
        return Part.whole(parts.read_images(path, arguments.image_size)), run_id, None
    if tokenizer is None:
        raise cli.UserError("--indexes_path needs the tokenizer of the indices; add --model_dir")
    model, config = tokenizer.model, tokenizer.model.config
    path = tracking.fetch(arguments.indexes_path)
    indices = read_indices(path, codebook_size=config.codebook_size, depth=config.depth)
    run_id = ""
    if indices.meta is not None:
        indices.meta.check_tokenizer(tokenizer, path)
        run_id = indices.meta.gpt_run_id
    size = tuple(side * config.downsampling for side in indices.latent_dim)
    decoded = DecodedImages(indices.tensor(), indices.rows, model.decode, config.in_channels, size)
    tokens = sample_report.Tokens(decoded.grids, model.encode, config.codebook_size, config.depth)
    return Part.whole(decoded), run_id, tokens


def evaluate_samples(arguments: argparse.Namespace) -> None:
    device, seed = processes.pick_device(arguments.device), arguments.seed
    network = published.open_network(arguments.features, arguments.feature_weights, device)
    tokenizer = load_tokenizer(arguments.model_dir, device) if arguments.model_dir else None
    samples, run_id, tokens = read_samples(arguments, tokenizer)
    parts.check_count(samples.images, str(arguments.images or arguments.indexes_path))
    origin = checkpoint.Provenance() if tokenizer is None else tokenizer.provenance
    train, held_out = parts.read_real(
        arguments.path_to_data,
        arguments.path_to_test,
        size=arguments.image_size or (samples.images.size if tokens else None),
        channels=samples.images.channels,
        val_fraction=origin.val_fraction,
        seed=origin.seed,
    )
    if train.images.size != samples.images.size:
        sizes = ["x".join(map(str, part.images.size)) for part in (train, samples)]
        raise cli.UserError(
            f"the images in {arguments.path_to_data} have {sizes[0]} pixels, the samples "
            f"{sizes[1]}; bring both to one size by --image_size H,W"
        )
    source = Path(arguments.images or arguments.indexes_path)
    output_dir = Path(arguments.output_dir or source.parent / "evaluation")
    with tracking.continue_run(output_dir, arguments.run_id, run_id, homes=("gpt",)) as run:
        if network is None:
            network = features.taught_network(*train, arguments.path_to_data, device, seed)
        found = sample_report.report(
            *(network, train, held_out, samples),
            device=device,
            batch_size=arguments.batch_size,
            seed=seed,
            protocol=record.protocol(arguments, train.images, network),
            tokens=tokens,
        )
        found.save(run, "samples", "evaluation/samples")


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
    tokenizer = load_tokenizer(arguments.model_dir, device)
    if vocabulary.tokenizer_sha256 not in ("", tokenizer.sha256):
        raise cli.UserError(
            f"the GPT in {gpt.folder} belongs to the tokenizer {vocabulary.tokenizer_sha256[:12]}, "
            f"but {tokenizer.folder} is {tokenizer.sha256[:12]}; use models of one tokenizer"
        )
    config = tokenizer.model.config
    dataset = parts.read_images(arguments.path_to_data, config.image_size, config.in_channels)
    labels = [""] * len(dataset) if arguments.unconditional else [r.label for r in dataset.rows]
    conditions = read_conditions(arguments, vocabulary, device)
    prefix = make_prefix(torch.tensor(vocabulary.tokens(labels)), conditions)
    output_dir = Path(arguments.output_dir or gpt.home / "evaluation")
    with tracking.continue_run(
        output_dir, arguments.run_id, gpt.provenance.run_id, homes=("gpt",)
    ) as run:
        bits = bits_of_images(tokenizer.model, gpt.model, dataset, prefix, arguments.batch_size)
        order = bits.argsort(stable=True)
        weights = bootstrap.resample(len(dataset), arguments.seed)
        tokens = config.depth * math.prod(config.latent_dim) / math.prod(config.image_size)
        found = {
            "bits_per_token": bootstrap.mean(bits, weights),
            "bits_per_pixel": bootstrap.mean(bits * tokens, weights),
        }
        ends = [order[:SHOWN], order[-SHOWN:].flip(0)]
        usual, strange = (figures.grid(images) for images in dataset.batches(ends, device))
        rows = [dataset.rows[row] for row in order.tolist()]
        columns = {
            "image_path": [row.image_path for row in rows],
            "label": [row.label for row in rows],
            "bits_per_token": bits[order].tolist(),
        }
        pictures = {"most_usual": usual, "strangest": strange}
        protocol = record.protocol(arguments, dataset) | {"images": len(dataset)}
        whole = record.Record(found, protocol, columns, pictures)
        whole.save(run, "likelihood", f"evaluation/{Path(arguments.path_to_data).stem}")


def main(arguments: argparse.Namespace) -> None:
    """Compare two evaluations, or make one.

    Raises:
        UserError: neither was asked for.
    """
    if arguments.compare:
        print(comparison.compare_all(*map(find_evaluation, arguments.compare)))
    elif arguments.evaluate is None:
        raise cli.UserError(
            "nothing to do; give reconstructions, samples or likelihood, or --compare RUN_A RUN_B"
        )
    else:
        arguments.evaluate(arguments)


def find_evaluation(place: str) -> dict[str, Path]:
    """The records of a folder, a JSON file or an MLflow run, by name."""
    path = Path(place)
    return comparison.find(path if path.exists() else tracking.fetch(f"runs:/{place}/evaluation"))


def add_feature_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--features",
        choices=features.NETWORKS,
        default=default,
        help="network through which sets of images are compared: a small classifier that the "
        "labels of the data teach in about a minute, Inception (FID) or DINOv2 (default: "
        f"{default or 'none'})",
    )
    parser.add_argument(
        "--feature_weights",
        default="",
        metavar="PATH",
        help="weights file of Inception (default: downloads it), folder of DINOv2",
    )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.set_defaults(evaluate=None)
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="say of two evaluations (folders, JSON files or run ids) where they differ by more "
        "than noise",
    )
    commands = parser.add_subparsers(metavar="reconstructions | samples | likelihood")
    one = commands.add_parser("reconstructions", help="error of a tokenizer on the images of a CSV")
    one.set_defaults(evaluate=evaluate_reconstructions)
    two = commands.add_parser("samples", help="samples beside real images")
    two.set_defaults(evaluate=evaluate_samples)
    three = commands.add_parser("likelihood", help="rank images from usual to strange")
    three.set_defaults(evaluate=evaluate_likelihood)
    three.add_argument("--model_path", required=True, help="GPT: a folder, or runs:/...")
    for command in (one, three):
        command.add_argument("--model_dir", required=True, help="tokenizer: a folder, or runs:/...")
    two.add_argument("--images", help="folder of images_from_indexes.py, or a CSV")
    two.add_argument("--indexes_path", help="indices of transformer_generation.py instead")
    two.add_argument("--model_dir", help="tokenizer of --indexes_path")
    for command in (one, two, three):
        command.add_argument(
            "--path_to_data", required=True, metavar="CSV", help="CSV of real images"
        )
    one.add_argument(
        "--path_to_train", metavar="CSV", help="teaches the classifier (default: --path_to_data)"
    )
    one.add_argument(
        "--lpips", choices=tuple(BACKBONES), help="also LPIPS, through this network (default: no)"
    )
    one.add_argument(
        "--lpips_weights",
        default="",
        metavar="PATH",
        help="torchvision's weights of it (default: downloads them)",
    )
    two.add_argument(
        "--path_to_test",
        metavar="CSV",
        help="real images that no training has seen (default: the validation images of "
        "--path_to_data)",
    )
    two.add_argument(
        "--image_size",
        type=cli.height_and_width,
        metavar="H,W",
        help="resize and crop all images to this (default: what they have)",
    )
    add_feature_flags(one, None)
    add_feature_flags(two, "classifier")
    three.add_argument(
        "--condition_model_dir", help="tokenizer of the pictures in the column condition_path"
    )
    three.add_argument(
        "--unconditional", action="store_true", help="do not tell the GPT the images' labels"
    )
    for command in (one, two, three):
        command.add_argument("--run_id", help="MLflow run to log to (default: the model's)")
        command.add_argument("--output_dir", help="where the files go (default: evaluation/)")
        command.add_argument(
            "--seed", type=int, default=0, help="of the classifier and all resamples (default: 0)"
        )
        cli.add_inference_flags(command, batch_size=256)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
