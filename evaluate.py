"""How good are a tokenizer's reconstructions and a GPT's samples, and how usual is an image?"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from transformer import GPT, make_prefix
from utils import addresses, cli, distributed, tracking
from utils.data.images import ImageDataset
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.evaluation import comparison, features, parts, published, record
from utils.evaluation.likelihood_report import bits_of_images, report_likelihood
from utils.evaluation.reconstruction_report import report_reconstructions, teach
from utils.evaluation.sample_report import report_samples
from utils.evaluation.samples import read_samples
from utils.provenance import LoadedModel, Split
from utils.training import checkpoint
from vqvae import VQVAE
from vqvae.losses import BACKBONES, PerceptualLoss

ALL_ROWS = "all of path_to_data"  # what the protocol says where no split counts


def load_tokenizer(address: str, device: torch.device) -> LoadedModel:
    return checkpoint.load_model(addresses.fetch(address), VQVAE, device)


def evaluate_reconstructions(arguments: argparse.Namespace) -> None:
    if arguments.lpips_weights and not arguments.lpips:
        raise cli.UserError("--lpips_weights belongs to --lpips; add it, with alex or vgg")
    if arguments.path_to_train and arguments.features != "classifier":
        raise cli.UserError("--path_to_train belongs to --features classifier; add that")
    device = distributed.pick_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model_dir, device)
    config, options = tokenizer.model.config, cli.image_options(arguments)
    network = published.open_network(arguments.features, arguments.feature_weights, device)
    lpips, measured, teaching = None, None, None
    if arguments.lpips:
        what = arguments.lpips, arguments.lpips_weights
        lpips = cli.build(PerceptualLoss, *what).to(device)
        measured = {"network": arguments.lpips, "sha256": features.weights_sha256(lpips)}
    data = arguments.path_to_data
    dataset = parts.read_images(
        data, "--path_to_data", config.image_size, config.in_channels, **options
    )
    name = record.name_of(Path(data))
    output_dir = Path(arguments.output_dir or tokenizer.home / record.FOLDER / name)
    with tracking.continue_run(
        output_dir, arguments.run_id, tokenizer.provenance.run_id, homes=("tokenizer",)
    ) as run:
        if arguments.features == "classifier":
            path, seed = arguments.path_to_train, arguments.seed
            network, teaching = teach(path, dataset, device, seed, **options)
        found = report_reconstructions(
            *(tokenizer.model, dataset, network),
            lpips=lpips,
            device=device,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            protocol=record.protocol(
                *(arguments, dataset, network),
                rows=ALL_ROWS,
                tokenizer_sha256=tokenizer.sha256,
                lpips=measured,
            ),
        )
        found.save(run, "reconstructions", name, path_to_data=dataset, path_to_train=teaching)


def evaluate_samples(arguments: argparse.Namespace) -> None:
    device, seed = distributed.pick_device(arguments.device), arguments.seed
    network = published.open_network(arguments.features, arguments.feature_weights, device)
    tokenizer = load_tokenizer(arguments.model_dir, device) if arguments.model_dir else None
    options = cli.image_options(arguments)
    samples = read_samples(
        arguments.images, arguments.indexes_path, tokenizer, arguments.image_size, **options
    )
    drawn, split = samples.part.images, samples.split
    if tokenizer is not None:
        split = Split(tokenizer.provenance.val_fraction, tokenizer.provenance.seed)
    paths = arguments.path_to_data, arguments.path_to_test
    resize = bool(arguments.image_size or samples.tokens)
    real = parts.read_real(*paths, split, drawn, resize=resize, **options)
    train = real.train.images
    home = tracking.home_of(arguments.run_id or samples.run_id)
    name = record.name_of(samples.place)
    place = (home or samples.place.parent) / record.FOLDER / name
    output_dir = Path(arguments.output_dir or place)
    with tracking.continue_run(output_dir, arguments.run_id, samples.run_id, homes=("gpt",)) as run:
        if network is None:
            network = features.taught_network(*real.train, arguments.path_to_data, device, seed)
        found = report_samples(
            *(network, real, samples),
            device=device,
            batch_size=arguments.batch_size,
            seed=seed,
            protocol=record.protocol(
                *(arguments, train, network), split=real.split, **samples.hashes
            ),
        )
        test = real.held_out.images if arguments.path_to_test else None
        images = drawn if arguments.images else None
        found.save(run, "samples", name, path_to_data=train, path_to_test=test, images=images)


@torch.inference_mode()
def encode_conditions(
    arguments: argparse.Namespace, vocabulary: Vocabulary, device: torch.device
) -> Tensor | None:
    """The conditions of a CSV's images, (N, hc, wc); None for a GPT that takes none.

    Raises:
        UserError: no tokenizer for them, another one, or one that is of no use.
    """
    address, told = arguments.condition_model_dir, f"the GPT in {arguments.model_path} is told"
    if vocabulary.condition is None and address:
        raise cli.UserError(f"{told} no conditions; leave out --condition_model_dir")
    if vocabulary.condition is None:
        return None
    if not address:
        raise cli.UserError(
            f"{told} conditions; give their tokenizer by --condition_model_dir, and their pictures "
            "in a column condition_path"
        )
    if arguments.skip_bad_images:
        raise cli.UserError(
            "--skip_bad_images does not go with --condition_model_dir: a picture and its condition "
            "come and go together; take both out of the CSV"
        )
    tokenizer = load_tokenizer(address, device)
    vocabulary.condition.check_tokenizer(tokenizer, f"the condition of {arguments.model_path}")
    config = tokenizer.model.config
    pictures = ImageDataset(
        arguments.path_to_data,
        column="condition_path",
        size=config.image_size,
        channels=config.in_channels,
        **cli.image_options(arguments),
    )
    batches = torch.arange(len(pictures)).split(arguments.batch_size)
    return torch.cat([tokenizer.model.encode(x).cpu() for x in pictures.batches(batches, device)])


def evaluate_likelihood(arguments: argparse.Namespace) -> None:
    device = distributed.pick_device(arguments.device)
    gpt = checkpoint.load_model(addresses.fetch(arguments.model_path), GPT, device)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    tokenizer = load_tokenizer(arguments.model_dir, device)
    vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, tokenizer.model.config)
    config, data = tokenizer.model.config, arguments.path_to_data
    options = cli.image_options(arguments)
    dataset = parts.read_images(
        data, "--path_to_data", config.image_size, config.in_channels, **options
    )
    labels = [""] * len(dataset) if arguments.unconditional else [r.label for r in dataset.rows]
    conditions = encode_conditions(arguments, vocabulary, device)
    prefix = make_prefix(torch.tensor(vocabulary.tokens(labels)), conditions)
    name = record.name_of(Path(data))
    output_dir = Path(arguments.output_dir or gpt.home / record.FOLDER / name)

    def cost(told: Tensor, images: Tensor) -> Tensor:
        return gpt.model(told, tokenizer.model.encode(images), loss=True)

    with tracking.continue_run(
        output_dir, arguments.run_id, gpt.provenance.run_id, homes=("gpt",)
    ) as run:
        bits = bits_of_images(cost, dataset, prefix, device, arguments.batch_size)
        found = report_likelihood(
            *(bits, dataset),
            config.depth * math.prod(config.latent_dim) / math.prod(config.image_size),
            device=device,
            seed=arguments.seed,
            protocol=record.protocol(
                *(arguments, dataset),
                rows=ALL_ROWS,
                unconditional=arguments.unconditional,
                gpt_sha256=gpt.sha256,
                tokenizer_sha256=tokenizer.sha256,
            ),
        )
        found.save(run, "likelihood", name, path_to_data=dataset)


def main(arguments: argparse.Namespace) -> None:
    """Compare two evaluations, or make one.

    Raises:
        UserError: neither was asked for, or both.
    """
    if arguments.compare and arguments.evaluate:
        raise cli.UserError("--compare reads two evaluations and makes none; give it by itself")
    if arguments.compare:
        print(comparison.compare_all(*map(comparison.find, arguments.compare)))
    elif arguments.evaluate is None:
        raise cli.UserError(
            "nothing to do; give reconstructions, samples or likelihood, or --compare RUN_A RUN_B"
        )
    else:
        arguments.evaluate(arguments)


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
    one, two, three = (
        commands.add_parser(name, help=text, allow_abbrev=False)
        for name, text in (
            ("reconstructions", "error of a tokenizer on the images of a CSV"),
            ("samples", "samples beside real images"),
            ("likelihood", "rank images from usual to strange"),
        )
    )
    one.set_defaults(evaluate=evaluate_reconstructions)
    two.set_defaults(evaluate=evaluate_samples)
    three.set_defaults(evaluate=evaluate_likelihood)
    three.add_argument("--model_path", required=True, help="GPT: a folder, or runs:/...")
    for command in (one, three):
        command.add_argument("--model_dir", required=True, help="tokenizer: a folder, or runs:/...")
    two.add_argument("--images", help="folder of images_from_indexes.py, or a CSV")
    two.add_argument("--indexes_path", help="indices of transformer_generation.py instead")
    two.add_argument(
        "--model_dir",
        help="tokenizer of --indexes_path; of --images that do not say how their training split "
        "its data",
    )
    for command in (one, two, three):
        command.add_argument(
            "--path_to_data", required=True, metavar="CSV", help="CSV of real images"
        )
    one.add_argument(
        "--path_to_train",
        metavar="CSV",
        help="teaches the classifier (default: --path_to_data, whose labels are then not compared)",
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
        command.add_argument(
            "--output_dir",
            help="where the files go (default: evaluation/<folder>-<name of the CSV or the "
            "samples>/ in the model's output folder, else beside the samples)",
        )
        command.add_argument(
            "--seed", type=int, default=0, help="of the classifier and all resamples (default: 0)"
        )
        cli.add_inference_flags(command, batch_size=256)
        cli.add_image_flags(command)
        command.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # so that one before the subcommand counts, too
            help="show the traceback of an error, not only its line",
        )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
