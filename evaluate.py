"""How good are a tokenizer's reconstructions and a GPT's samples, and how usual is an image?"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from transformer import GPT, GPTConfig, make_prefix
from utils import checkpoint, cli, processes, tracking
from utils.data.images import ImageDataset
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.evaluation import comparison, features, parts, published, record
from utils.evaluation.likelihood_report import bits_of_images, report_likelihood
from utils.evaluation.parts import Part
from utils.evaluation.reconstruction_report import report_reconstructions
from utils.evaluation.sample_report import report_samples
from utils.evaluation.samples import Samples, read_drawn, read_pictures
from utils.provenance import Split
from vqvae import VQVAE, VQVAEConfig
from vqvae.perceptual import BACKBONES, PerceptualLoss

ALL_ROWS = "all of path_to_data"  # what the protocol says where no split counts


def load_tokenizer(address: str, device: torch.device) -> checkpoint.LoadedModel:
    return checkpoint.load_model(tracking.fetch(address), VQVAE, VQVAEConfig, device)


def output_dir_of(arguments: argparse.Namespace, home: Path, name: str) -> Path:
    """Where the files of an evaluation go."""
    return Path(arguments.output_dir or home / record.FOLDER / name)


def save(
    found: record.Record,
    run: tracking.Run,
    kind: str,
    name: str,
    **sets: ImageDataset,
) -> None:
    """Write and log a record, and list the files of each set that could not be read."""
    found.save(run, kind, name)
    for flag, images in sets.items():
        images.write_skipped(run.output_dir, f"skipped-{flag}.csv")


def evaluate_reconstructions(arguments: argparse.Namespace) -> None:
    if arguments.lpips_weights and not arguments.lpips:
        raise cli.UserError("--lpips_weights belongs to --lpips; add it, with alex or vgg")
    if arguments.path_to_train and arguments.features != "classifier":
        raise cli.UserError("--path_to_train belongs to --features classifier; add that")
    device = processes.pick_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model_dir, device)
    config, options = tokenizer.model.config, cli.image_options(arguments)
    network = published.open_network(arguments.features, arguments.feature_weights, device)
    lpips, measured = None, {}
    if arguments.lpips:
        what = arguments.lpips, arguments.lpips_weights
        lpips = cli.build(PerceptualLoss, *what, otherwise="leave out --lpips").to(device)
        measured = {"network": arguments.lpips, "sha256": features.weights_sha256(lpips)}
    data = arguments.path_to_data
    dataset = parts.read_images(
        data, "--path_to_data", config.image_size, config.in_channels, **options
    )
    sets = {"path_to_data": dataset}
    name = record.name_of(Path(data))
    output_dir = output_dir_of(arguments, tokenizer.home, name)
    with tracking.continue_run(
        output_dir, arguments.run_id, tokenizer.provenance.run_id, homes=("tokenizer",)
    ) as run:
        if arguments.features == "classifier":
            network, sets = teach(arguments, dataset, device)
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
                **({"lpips": measured} if measured else {}),
            ),
        )
        save(found, run, "reconstructions", name, **sets)


def teach(
    arguments: argparse.Namespace, dataset: ImageDataset, device: torch.device
) -> tuple[features.FeatureNetwork, dict[str, ImageDataset]]:
    """A classifier for the images whose reconstructions are judged, and the sets by their flags.

    Where these images themselves have to teach it, it tells nothing of their labels: it knows them.
    """
    data, path = arguments.path_to_data, arguments.path_to_train
    if path:
        options, sizes = cli.image_options(arguments), (dataset.size, dataset.channels)
        other = parts.read_images(path, "--path_to_train", *sizes, **options)
        if checkpoint.sha256(Path(path)) != checkpoint.sha256(Path(data)):
            network = features.taught_network(*Part.whole(other), path, device, arguments.seed)
            return network, {"path_to_data": dataset, "path_to_train": other}
    network = features.taught_network(*Part.whole(dataset), data, device, arguments.seed)
    print(
        "classifier: taught by these very images, so that their labels are not compared; "
        "--path_to_train CSV teaches it others"
    )
    return replace(network, class_names=()), {"path_to_data": dataset}


def read_samples(
    arguments: argparse.Namespace, tokenizer: checkpoint.LoadedModel | None
) -> Samples:
    """The samples that the flags name, as pictures or as indices.

    Raises:
        UserError: neither images nor indices with their tokenizer, or both; see their readers.
    """
    if bool(arguments.images) == bool(arguments.indexes_path):
        raise cli.UserError("give the samples by either --images or --indexes_path")
    if arguments.images:
        options = cli.image_options(arguments)
        return read_pictures(Path(arguments.images), arguments.image_size, **options)
    if arguments.image_size:
        raise cli.UserError(
            "--image_size does not go with --indexes_path, whose images have the size that the "
            "tokenizer decodes; leave it out"
        )
    if tokenizer is None:
        raise cli.UserError("--indexes_path needs the tokenizer of the indices; add --model_dir")
    path = tracking.fetch(arguments.indexes_path)
    samples = read_drawn(path, tokenizer)
    if path != Path(arguments.indexes_path):  # fetched to a folder that nobody will look into
        samples = samples._replace(place=Path("outputs", *arguments.indexes_path.split("/")[1:]))
    return samples


def evaluate_samples(arguments: argparse.Namespace) -> None:
    device, seed = processes.pick_device(arguments.device), arguments.seed
    network = published.open_network(arguments.features, arguments.feature_weights, device)
    tokenizer = load_tokenizer(arguments.model_dir, device) if arguments.model_dir else None
    samples = read_samples(arguments, tokenizer)
    drawn, split = samples.part.images, samples.split
    if tokenizer is not None:
        split = Split(tokenizer.provenance.val_fraction, tokenizer.provenance.seed)
    real = parts.read_real(
        *(arguments.path_to_data, arguments.path_to_test, split),
        size=arguments.image_size or (drawn.size if samples.tokens else None),
        channels=drawn.channels,
        **cli.image_options(arguments),
    )
    train = real.train.images
    if train.size != drawn.size:
        sizes = ["x".join(map(str, images.size)) for images in (train, drawn)]
        raise cli.UserError(
            f"the images in {arguments.path_to_data} have {sizes[0]} pixels, the samples "
            f"{sizes[1]}; bring both to one size by --image_size H,W"
        )
    home = tracking.home_of(arguments.run_id or samples.run_id)
    name = record.name_of(samples.place)
    output_dir = output_dir_of(arguments, home or samples.place.parent, name)
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
        sets = {"path_to_data": train}
        if arguments.path_to_test:
            sets["path_to_test"] = real.held_out.images
        if arguments.images:
            sets["images"] = drawn
        save(found, run, "samples", name, **sets)


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
    device = processes.pick_device(arguments.device)
    gpt = checkpoint.load_model(tracking.fetch(arguments.model_path), GPT, GPTConfig, device)
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
    output_dir = output_dir_of(arguments, gpt.home, name)

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
        save(found, run, "likelihood", name, path_to_data=dataset)


def main(arguments: argparse.Namespace) -> None:
    """Compare two evaluations, or make one.

    Raises:
        UserError: neither was asked for, or both.
    """
    if arguments.compare and arguments.evaluate:
        raise cli.UserError("--compare reads two evaluations and makes none; give it by itself")
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
    if path.exists():
        return comparison.find(path)
    return comparison.find(tracking.fetch(f"runs:/{place}/{record.FOLDER}"))


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
        command.add_argument(  # as before the subcommand; without it, what was said there stays
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
