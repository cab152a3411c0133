"""Evaluate reconstructions of a tokenizer, samples of a GPT, or the likelihood of images."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer import GPT, make_prefix
from utils import cli, distributed, tracking
from utils.data.images import ImageConfig, ImageDataset
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.evaluation import features, image_sets, published, records, report
from utils.evaluation.records import Record
from utils.model_folder import load_model
from utils.provenance import LoadedModel
from vqvae import VQVAE
from vqvae.losses import BACKBONES, PerceptualLoss

ALL_ROWS = "all of path_to_data"  # in the protocol of evaluations without a split


def load_tokenizer(address: str, device: torch.device) -> LoadedModel:
    return load_model(address, VQVAE, device)


def read_images(flags: argparse.Namespace, flag: str, config: Any) -> ImageDataset:
    """The CSV of a flag in the size of a tokenizer."""
    options = {"config": cli.read_flags(ImageConfig, flags), **config.image_options}
    return image_sets.read_images(getattr(flags, flag), f"--{flag}", **options)


def run_evaluation(
    flags: argparse.Namespace,
    evaluate: Callable[[report.Settings], Record],
    source: Path,
    home: Path,
    run_id: str,
    data: dict[str, Any],
    protocol: dict[str, Any],
) -> None:
    """Evaluate, write the record below `home`, and log it to the run of the model.

    `source` names the evaluation; `data` are the images by the flags that named them.
    """
    name, stage = records.name_of(source), "gpt" if flags.kind != "reconstructions" else "tokenizer"
    output_dir = Path(flags.output_dir or home / records.FOLDER / name)
    device = distributed.pick_device(flags.device)
    with tracking.continue_run(output_dir, flags.run_id, run_id, homes=(stage,)) as run:
        record = evaluate(report.Settings(device, flags.batch_size, flags.seed))
        common = records.protocol(flags, data["path_to_data"], device)
        record = replace(record, protocol={**common, **protocol, **record.protocol})
        record.save(run, flags.kind, name)
        for flag, images in data.items():
            images.write_skipped(output_dir, f"skipped-{flag}.csv")


def evaluate_reconstructions(flags: argparse.Namespace) -> None:
    if flags.lpips_weights and not flags.lpips:
        raise cli.UserError("--lpips_weights belongs to --lpips; add it, with alex or vgg")
    if flags.path_to_train and flags.features != "classifier":
        raise cli.UserError("--path_to_train belongs to --features classifier; add that")
    device = distributed.pick_device(flags.device)
    tokenizer = load_tokenizer(flags.model_dir, device)
    opened = published.open_network(flags.features, flags.feature_weights, device)
    lpips, lpips_protocol = None, None
    if flags.lpips:
        lpips = cli.build_or_error(PerceptualLoss, flags.lpips, flags.lpips_weights).to(device)
        lpips_protocol = {"network": flags.lpips, "sha256": features.weights_sha256(lpips)}
    data = {"path_to_data": read_images(flags, "path_to_data", tokenizer.model.config)}
    dataset = data["path_to_data"]
    if flags.path_to_train:
        data["path_to_train"] = read_images(flags, "path_to_train", tokenizer.model.config)

    def evaluate(settings: report.Settings) -> Record:
        network = opened
        if flags.features == "classifier":
            network = report.reconstruction_classifier(
                dataset, data.get("path_to_train", dataset), settings
            )
        return report.report_reconstructions(tokenizer.model, dataset, network, lpips, settings)

    protocol = {"rows": ALL_ROWS, "tokenizer_sha256": tokenizer.sha256, "lpips": lpips_protocol}
    place = dataset.path, tokenizer.home, tokenizer.provenance.run_id
    run_evaluation(flags, evaluate, *place, data, protocol)


def evaluate_samples(flags: argparse.Namespace) -> None:
    device, options = (
        distributed.pick_device(flags.device),
        {"config": cli.read_flags(ImageConfig, flags)},
    )
    opened = published.open_network(flags.features, flags.feature_weights, device)
    tokenizer = load_tokenizer(flags.model_dir, device) if flags.model_dir else None
    source = flags.images, flags.indexes_path
    samples = image_sets.read_samples(*source, tokenizer, flags.image_size, **options)
    split = samples.split
    if tokenizer is not None:
        split = tokenizer.provenance.split
        names = "value_range", "resampling"  # of the files that the samples were learned from
        options |= {name: getattr(tokenizer.model.config, name) for name in names}
    resize = bool(flags.image_size or flags.indexes_path)
    paths, images = (flags.path_to_data, flags.path_to_test), samples.images.images
    real = image_sets.read_real(*paths, split, images, resize=resize, **options)
    data: dict[str, Any] = {"path_to_data": real.train.images}
    data |= {"path_to_test": real.held_out.images} if flags.path_to_test else {}
    data |= {"images": images} if flags.images else {}

    def evaluate(settings: report.Settings) -> Record:
        network = opened or features.train_classifier(
            *real.train, flags.path_to_data, device, flags.seed
        )
        return report.report_samples(network, real, samples, settings)

    home = tracking.home_of(flags.run_id or samples.run_id) or samples.place.parent
    protocol = {"split": real.split, **samples.hashes}
    run_evaluation(flags, evaluate, samples.place, home, samples.run_id, data, protocol)


@torch.inference_mode()
def encode_conditions(
    flags: argparse.Namespace, vocabulary: Vocabulary, device: torch.device
) -> Tensor | None:
    """The conditions of a CSV's images, (N, hc, wc); None for a GPT without conditions.

    Raises:
        UserError: no tokenizer for them, another one, or one that is not needed.
    """
    address, gpt = flags.condition_model_dir, f"the GPT in {flags.model_path}"
    if vocabulary.condition is None:
        if address:
            raise cli.UserError(f"{gpt} takes no conditions; leave out --condition_model_dir")
        return None
    if not address:
        raise cli.UserError(
            f"{gpt} takes conditions; give their tokenizer by --condition_model_dir, and their "
            "pictures in a column condition_path"
        )
    if flags.skip_bad_images:
        raise cli.UserError(
            "--skip_bad_images cannot be combined with --condition_model_dir: a skipped picture "
            "leaves its image without a condition; take both out of the CSV"
        )
    tokenizer = load_tokenizer(address, device)
    owner = f"the condition of {flags.model_path}"
    vocabulary.condition.check_tokenizer(tokenizer.sha256, tokenizer.folder, owner=owner)
    config = tokenizer.model.config
    pictures = ImageDataset(
        flags.path_to_data,
        column="condition_path",
        **config.image_options,
        config=cli.read_flags(ImageConfig, flags),
    )
    batches = torch.arange(len(pictures)).split(flags.batch_size)
    return torch.cat([tokenizer.model.encode(x).cpu() for x in pictures.batches(batches, device)])


def evaluate_likelihood(flags: argparse.Namespace) -> None:
    device = distributed.pick_device(flags.device)
    gpt = load_model(flags.model_path, GPT, device)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    tokenizer = load_tokenizer(flags.model_dir, device)
    config = tokenizer.model.config
    vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, config)
    dataset = read_images(flags, "path_to_data", config)
    labels = ["" if flags.unconditional else row.label for row in dataset.rows]
    conditions = encode_conditions(flags, vocabulary, device)
    prefix = make_prefix(torch.tensor(vocabulary.tokens(labels)), conditions)
    tokens_per_pixel = config.depth * math.prod(config.latent_dim) / math.prod(config.image_size)

    def nats_per_token(given: Tensor, images: Tensor) -> Tensor:
        return gpt.model.loss(given, tokenizer.model.encode(images))

    def evaluate(settings: report.Settings) -> Record:
        return report.report_likelihood(nats_per_token, dataset, prefix, tokens_per_pixel, settings)

    protocol = {"rows": ALL_ROWS, "unconditional": flags.unconditional}
    protocol |= {"gpt_sha256": gpt.sha256, "tokenizer_sha256": tokenizer.sha256}
    place = dataset.path, gpt.home, gpt.provenance.run_id
    run_evaluation(flags, evaluate, *place, {"path_to_data": dataset}, protocol)


def main(flags: argparse.Namespace) -> None:
    """Compare two evaluations, or make one.

    Raises:
        UserError: neither a command nor --compare, or both.
    """
    if flags.compare and flags.kind:
        raise cli.UserError("--compare reads two evaluations and makes none; give it by itself")
    if flags.compare:
        print(records.compare_all(*map(records.find, flags.compare)))
    elif flags.kind is None:
        raise cli.UserError(
            "nothing to do; give reconstructions, samples or likelihood, or --compare RUN_A RUN_B"
        )
    else:
        flags.evaluate(flags)


def add_feature_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--features",
        choices=features.NETWORKS,
        default=default,
        help="network that sets of images are compared in: a small classifier, trained on the "
        "labels of the data in about a minute, Inception (FID) or DINOv2 (default: "
        f"{default or 'none'})",
    )
    weights = "weights file of Inception (default: downloads it), folder of DINOv2"
    parser.add_argument("--feature_weights", default="", metavar="PATH", help=weights)


def add_common_flags(command: argparse.ArgumentParser, model_dir: str = "") -> None:
    help_text = model_dir or "tokenizer: a folder, or runs:/..."
    command.add_argument("--model_dir", help=help_text, required=not model_dir)
    command.add_argument("--path_to_data", metavar="CSV", help="CSV of real images", required=True)
    command.add_argument("--run_id", help="MLflow run to log to (default: the model's)")
    place = "evaluation/<folder>-<name of the CSV or the samples>/ in the model's output folder"
    command.add_argument(
        "--output_dir",
        help=f"where the files go (default: {place}, else beside the samples)",
    )
    seed = "of the classifier and all resamples (default: 0)"
    command.add_argument("--seed", type=int, default=0, help=seed)
    cli.add_inference_flags(command, batch_size=256)
    cli.add_flags(command, ImageConfig, "images")
    debug = "show the traceback of an error, not only its line"
    # Suppressed, so that one before the subcommand counts, too.
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="print which metrics of two evaluations (folders, JSON files or run ids) differ by "
        "more than noise",
    )
    commands = parser.add_subparsers(metavar="reconstructions | samples | likelihood", dest="kind")
    options: dict[str, Any] = {"allow_abbrev": False}
    one = commands.add_parser("reconstructions", help="errors of a tokenizer on a CSV", **options)
    two = commands.add_parser("samples", help="samples beside real images", **options)
    three = commands.add_parser("likelihood", help="rank images by their likelihood", **options)

    one.set_defaults(evaluate=evaluate_reconstructions)
    add_common_flags(one)
    trains = "trains the classifier (default: --path_to_data, whose labels are then not compared)"
    one.add_argument("--path_to_train", metavar="CSV", help=trains)
    network = "also LPIPS, through this network (default: no)"
    one.add_argument("--lpips", choices=tuple(BACKBONES), help=network)
    weights = "torchvision's weights of it (default: downloads them)"
    one.add_argument("--lpips_weights", default="", metavar="PATH", help=weights)
    add_feature_flags(one, None)

    two.set_defaults(evaluate=evaluate_samples)
    split = "--images that do not record how their training split its data"
    add_common_flags(two, f"tokenizer of --indexes_path, or of {split}")
    two.add_argument("--images", help="folder of images_from_indexes.py, or a CSV")
    two.add_argument("--indexes_path", help="indices of transformer_generation.py instead")
    test = "real images that no training has used (default: validation images of --path_to_data)"
    two.add_argument("--path_to_test", metavar="CSV", help=test)
    two.add_argument(
        "--image_size",
        type=cli.height_and_width,
        metavar="H,W",
        help="resize and crop all images to this (default: the size that all of them have)",
    )
    add_feature_flags(two, "classifier")

    three.set_defaults(evaluate=evaluate_likelihood)
    add_common_flags(three)
    three.add_argument("--model_path", required=True, help="GPT: a folder, or runs:/...")
    condition = "tokenizer of the pictures in the column condition_path"
    three.add_argument("--condition_model_dir", help=condition)
    unconditional = "evaluate the GPT without the images' labels"
    three.add_argument("--unconditional", action="store_true", help=unconditional)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
