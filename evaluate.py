"""Evaluate reconstructions of a tokenizer, samples of a GPT, or the likelihood of images."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from transformer import GPT, make_prefix
from utils import addresses, cli, distributed, tracking
from utils.data.images import ImageDataset
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.evaluation import features, image_sets, published, records, report
from utils.evaluation.features import FeatureNetwork
from utils.evaluation.image_sets import ImageSet, Samples
from utils.evaluation.records import Record, protocol
from utils.files import sha256
from utils.provenance import LoadedModel, Split
from utils.training import checkpoint
from vqvae import VQVAE
from vqvae.losses import BACKBONES, PerceptualLoss

ALL_ROWS = "all of path_to_data"  # in the protocol of evaluations without a split


def load_tokenizer(address: str, device: torch.device) -> LoadedModel:
    return checkpoint.load_model(addresses.fetch(address), VQVAE, device)


def run_evaluation(
    flags: argparse.Namespace,
    kind: str,
    evaluate: Callable[[], Record],
    *,
    source: Path,
    home: Path,
    run_id: str,
    **sets: ImageDataset | None,
) -> None:
    """Evaluate, write the record below `home`, and log it to the run of the model.

    Args: `source` names the evaluation; `run_id` is the model's; `sets` are images by their flag.
    """
    name, stage = records.name_of(source), "tokenizer" if kind == "reconstructions" else "gpt"
    output_dir = Path(flags.output_dir or home / records.FOLDER / name)
    with tracking.continue_run(output_dir, flags.run_id, run_id, homes=(stage,)) as run:
        evaluate().save(run, kind, name, **sets)


# --- reconstructions ----------------------------------------------------------------------------


def evaluate_reconstructions(flags: argparse.Namespace) -> None:
    if flags.lpips_weights and not flags.lpips:
        raise cli.UserError("--lpips_weights belongs to --lpips; add it, with alex or vgg")
    if flags.path_to_train and flags.features != "classifier":
        raise cli.UserError("--path_to_train belongs to --features classifier; add that")
    device, data = distributed.pick_device(flags.device), flags.path_to_data
    tokenizer = load_tokenizer(flags.model_dir, device)
    config, options = tokenizer.model.config, cli.image_options(flags)
    opened = published.open_network(flags.features, flags.feature_weights, device)
    lpips, lpips_protocol = None, None
    if flags.lpips:
        what = flags.lpips, flags.lpips_weights
        lpips = cli.build(PerceptualLoss, *what).to(device)
        lpips_protocol = {"network": flags.lpips, "sha256": features.weights_sha256(lpips)}
    size = config.image_size, config.in_channels
    dataset = image_sets.read_images(data, "--path_to_data", *size, **options)
    training = None
    if flags.path_to_train:
        train_size = dataset.size, dataset.channels
        path = flags.path_to_train
        training = image_sets.read_images(path, "--path_to_train", *train_size, **options)

    def evaluate() -> Record:
        network = opened
        if flags.features == "classifier":
            network = train_classifier(dataset, training, device, flags.seed)
        return report.report_reconstructions(
            *(tokenizer.model, dataset, network),
            lpips=lpips,
            device=device,
            batch_size=flags.batch_size,
            seed=flags.seed,
            protocol=protocol(
                *(flags, dataset, network),
                rows=ALL_ROWS,
                tokenizer_sha256=tokenizer.sha256,
                lpips=lpips_protocol,
            ),
        )

    place = {"source": Path(data), "home": tokenizer.home, "run_id": tokenizer.provenance.run_id}
    sets = {"path_to_data": dataset, "path_to_train": training}
    run_evaluation(flags, "reconstructions", evaluate, **place, **sets)


def train_classifier(
    dataset: ImageDataset, training: ImageDataset | None, device: torch.device, seed: int
) -> FeatureNetwork:
    """A classifier for the images whose reconstructions are evaluated.

    It is trained on other images, or where there are none, on these very images: then it has no
    classes, since it has learned their labels.
    """
    images = dataset if training is None else training
    same = sha256(images.path) == sha256(dataset.path)
    images = dataset if same else images
    whole = ImageSet.whole(images)
    network = features.train_classifier(*whole, str(images.path), device, seed)
    if not same:
        return network
    print(
        "classifier: trained on these very images, so that their labels are not compared; "
        "--path_to_train CSV trains it on others"
    )
    return replace(network, class_names=())


# --- samples ------------------------------------------------------------------------------------


def read_samples(flags: argparse.Namespace, tokenizer: LoadedModel | None) -> Samples:
    """The samples that the flags name: pictures, or indices with their tokenizer.

    Raises:
        UserError: neither, both, or flags that cannot be combined.
    """
    if bool(flags.images) == bool(flags.indexes_path):
        raise cli.UserError("give the samples by either --images or --indexes_path")
    if flags.images:
        options = cli.image_options(flags)
        return image_sets.read_pictures(Path(flags.images), flags.image_size, **options)
    if flags.image_size:
        raise cli.UserError(
            "--image_size cannot be combined with --indexes_path, whose images have the size that "
            "the tokenizer decodes; leave it out"
        )
    if tokenizer is None:
        raise cli.UserError("--indexes_path needs the tokenizer of the indices; add --model_dir")
    path = addresses.fetch(flags.indexes_path)
    samples = image_sets.read_grids(path, tokenizer)
    if path != Path(flags.indexes_path):  # fetched to a temporary folder
        place = Path("outputs", *flags.indexes_path.split("/")[1:])
        samples = samples._replace(place=place)
    return samples


def evaluate_samples(flags: argparse.Namespace) -> None:
    device = distributed.pick_device(flags.device)
    opened = published.open_network(flags.features, flags.feature_weights, device)
    tokenizer = load_tokenizer(flags.model_dir, device) if flags.model_dir else None
    samples = read_samples(flags, tokenizer)
    sampled, split = samples.images.images, samples.split
    if tokenizer is not None:
        split = Split(tokenizer.provenance.val_fraction, tokenizer.provenance.seed)
    real = image_sets.read_real(
        *(flags.path_to_data, flags.path_to_test, split, sampled),
        resize=bool(flags.image_size or samples.tokens),
        **cli.image_options(flags),
    )
    train = real.train.images

    def evaluate() -> Record:
        network = opened or features.train_classifier(
            *real.train, flags.path_to_data, device, flags.seed
        )
        return report.report_samples(
            *(network, real, samples),
            device=device,
            batch_size=flags.batch_size,
            seed=flags.seed,
            protocol=protocol(flags, train, network, split=real.split, **samples.hashes),
        )

    home = tracking.home_of(flags.run_id or samples.run_id) or samples.place.parent
    place = {"source": samples.place, "home": home, "run_id": samples.run_id}
    sets = {
        "path_to_data": train,
        "path_to_test": real.held_out.images if flags.path_to_test else None,
        "images": sampled if flags.images else None,
    }
    run_evaluation(flags, "samples", evaluate, **place, **sets)


# --- likelihood ---------------------------------------------------------------------------------


@torch.inference_mode()
def encode_conditions(
    flags: argparse.Namespace, vocabulary: Vocabulary, device: torch.device
) -> Tensor | None:
    """The conditions of a CSV's images, (N, hc, wc); None for a GPT without conditions.

    Raises:
        UserError: no tokenizer for them, another one, or one that is not needed.
    """
    address = flags.condition_model_dir
    if vocabulary.condition is None and address:
        raise cli.UserError(
            f"the GPT in {flags.model_path} takes no conditions; leave out --condition_model_dir"
        )
    if vocabulary.condition is None:
        return None
    if not address:
        raise cli.UserError(
            f"the GPT in {flags.model_path} takes conditions; give their tokenizer by "
            "--condition_model_dir, and their pictures in a column condition_path"
        )
    if flags.skip_bad_images:
        raise cli.UserError(
            "--skip_bad_images cannot be combined with --condition_model_dir: a skipped picture "
            "would leave its image without a condition; take both out of the CSV"
        )
    tokenizer = load_tokenizer(address, device)
    vocabulary.condition.check_tokenizer(tokenizer, f"the condition of {flags.model_path}")
    config = tokenizer.model.config
    pictures = ImageDataset(
        flags.path_to_data,
        column="condition_path",
        size=config.image_size,
        channels=config.in_channels,
        **cli.image_options(flags),
    )
    batches = torch.arange(len(pictures)).split(flags.batch_size)
    return torch.cat([tokenizer.model.encode(x).cpu() for x in pictures.batches(batches, device)])


def evaluate_likelihood(flags: argparse.Namespace) -> None:
    device, data = distributed.pick_device(flags.device), flags.path_to_data
    gpt = checkpoint.load_model(addresses.fetch(flags.model_path), GPT, device)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    tokenizer = load_tokenizer(flags.model_dir, device)
    config = tokenizer.model.config
    vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, config)
    size, options = (config.image_size, config.in_channels), cli.image_options(flags)
    dataset = image_sets.read_images(data, "--path_to_data", *size, **options)
    labels = ["" if flags.unconditional else row.label for row in dataset.rows]
    conditions = encode_conditions(flags, vocabulary, device)
    prefix = make_prefix(torch.tensor(vocabulary.tokens(labels)), conditions)

    def nats_per_token(given: Tensor, images: Tensor) -> Tensor:
        return gpt.model.loss(given, tokenizer.model.encode(images))

    def evaluate() -> Record:
        bits = report.bits_of_images(nats_per_token, dataset, prefix, device, flags.batch_size)
        return report.report_likelihood(
            *(bits, dataset),
            config.depth * math.prod(config.latent_dim) / math.prod(config.image_size),
            device=device,
            seed=flags.seed,
            protocol=protocol(
                *(flags, dataset),
                rows=ALL_ROWS,
                unconditional=flags.unconditional,
                gpt_sha256=gpt.sha256,
                tokenizer_sha256=tokenizer.sha256,
            ),
        )

    place = {"source": Path(data), "home": gpt.home, "run_id": gpt.provenance.run_id}
    run_evaluation(flags, "likelihood", evaluate, **place, path_to_data=dataset)


# --- the script ---------------------------------------------------------------------------------


def find_records(place: str) -> dict[str, Path]:
    """The records at a path, or of an MLflow run by its id.

    Raises:
        UserError: there is none.
    """
    path = Path(place)
    if not path.exists():
        path = addresses.fetch(f"runs:/{place}/{records.FOLDER}")
    return records.find(path)


def main(flags: argparse.Namespace) -> None:
    """Compare two evaluations, or make one.

    Raises:
        UserError: neither a command nor --compare, or both.
    """
    if flags.compare and flags.evaluate:
        raise cli.UserError("--compare reads two evaluations and makes none; give it by itself")
    if flags.compare:
        print(records.compare_all(*map(find_records, flags.compare)))
    elif flags.evaluate is None:
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
        help="network through which sets of images are compared: a small classifier, trained on "
        "the labels of the data in about a minute, Inception (FID) or DINOv2 (default: "
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
        help="print which metrics of two evaluations (folders, JSON files or run ids) differ by "
        "more than noise",
    )
    commands = parser.add_subparsers(metavar="reconstructions | samples | likelihood")

    def add(name: str, text: str, evaluate: Callable, model_dir: str = "") -> cli.Parser:
        """A command with the flags that all of them have."""
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(evaluate=evaluate)
        command.add_argument(
            "--model_dir",
            required=not model_dir,
            help=model_dir or "tokenizer",
        )
        command.add_argument(
            "--path_to_data", required=True, metavar="CSV", help="CSV of real images"
        )
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
        # Suppressed, so that one before the subcommand counts, too.
        text = "show the traceback of an error, not only its line"
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)
        return command

    one = add(
        "reconstructions", "errors of a tokenizer on the images of a CSV", evaluate_reconstructions
    )
    one.add_argument(
        "--path_to_train",
        metavar="CSV",
        help="trains the classifier (default: --path_to_data, whose labels are then not compared)",
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
    add_feature_flags(one, None)

    two = add(
        "samples",
        "samples beside real images",
        evaluate_samples,
        "tokenizer of --indexes_path, or of --images that do not record how their training split "
        "its data",
    )
    two.add_argument("--images", help="folder of images_from_indexes.py, or a CSV")
    two.add_argument("--indexes_path", help="indices of transformer_generation.py instead")
    two.add_argument(
        "--path_to_test",
        metavar="CSV",
        help="real images that no training has used (default: the validation images of "
        "--path_to_data)",
    )
    two.add_argument(
        "--image_size",
        type=cli.height_and_width,
        metavar="H,W",
        help="resize and crop all images to this (default: the size that all of them have)",
    )
    add_feature_flags(two, "classifier")

    three = add("likelihood", "rank images by their likelihood", evaluate_likelihood)
    three.add_argument("--model_path", required=True, help="GPT: a folder, or runs:/...")
    three.add_argument(
        "--condition_model_dir", help="tokenizer of the pictures in the column condition_path"
    )
    three.add_argument(
        "--unconditional", action="store_true", help="evaluate the GPT without the images' labels"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
