"""Evaluate reconstructions of a tokenizer, samples of a GPT, or the likelihood of images."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer import GPT, make_prefix
from utils import addresses, cli, distributed, tracking
from utils.cli import UserError
from utils.data import sources
from utils.data.images import ImageConfig, ImageDataset
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.evaluation import distances, features, inputs, metrics, report
from utils.evaluation.features import ImageSet, Settings
from utils.evaluation.report import Record
from utils.files import read_json
from utils.model_folder import load_model
from vqvae import VQVAE
from vqvae.losses import BACKBONES, PerceptualLoss

KINDS = ("reconstructions", "samples", "likelihood")
# What must be equal where metrics are compared.
COMPARED = (
    *("images", "size", "channels", "path_to_data_sha256", "path_to_test_sha256", "split"),
    *("training_images", "features", "network_sha256", "seed", "unconditional"),
)
# Of single images.
PAIRED = {*metrics.IMAGE_METRICS, "lpips", "bits_per_token", "bits_per_pixel"}
ALL_ROWS = "all of path_to_data"  # in the protocol of evaluations without a split


def run_evaluation(
    flags: argparse.Namespace,
    evaluate: Callable[[], Record],
    place: tuple[Path, Path, str],
    data: dict[str, ImageDataset],
    protocol: dict[str, Any],
) -> None:
    """Evaluate, write the record, and log it to the run of the model.

    `place` is what is evaluated, the folder for the record, and the run of the model; `data` are
    the images by the flags that named them.
    """
    source, home, run_id = place
    name, stage = report.name_of(source), "gpt" if flags.kind != "reconstructions" else "tokenizer"
    output_dir = Path(flags.output_dir or home / report.FOLDER / name)
    with tracking.continue_run(output_dir, flags.run_id, run_id, homes=(stage,)) as run:
        record = evaluate()
        common = report.protocol(flags, data["path_to_data"])
        record = replace(record, protocol={**common, **protocol, **record.protocol})
        record.save(run, flags.kind, name)
        for flag, images in data.items():
            images.write_skipped(output_dir, f"skipped-{flag}.csv")


def evaluate_reconstructions(flags: argparse.Namespace, settings: Settings) -> None:
    if flags.lpips_weights and not flags.lpips:
        raise UserError("--lpips_weights belongs to --lpips; add it, with alex or vgg")
    if flags.path_to_train and flags.features != "classifier":
        raise UserError("--path_to_train belongs to --features classifier; add that")
    tokenizer = load_model(flags.model_dir, VQVAE, settings.device)
    network = inputs.open_network(flags.features, flags.feature_weights, settings.device)
    lpips, lpips_protocol = None, None
    if flags.lpips:
        lpips = cli.build_or_error(PerceptualLoss, flags.lpips, flags.lpips_weights).to(
            settings.device
        )
        lpips_protocol = {"network": flags.lpips, "sha256": features.weights_sha256(lpips)}
    names = ("path_to_data", "path_to_train") if flags.path_to_train else ("path_to_data",)
    options = tokenizer.model.config.image_options
    data = {name: inputs.read_images(flags, name, **options) for name in names}
    dataset, training = data["path_to_data"], data.get("path_to_train")
    new = training is not None and sources.digest(training.path) != sources.digest(dataset.path)

    def evaluate() -> Record:
        found = network
        if flags.features == "classifier":
            source = training if new and training is not None else dataset
            if not new:
                print(
                    "classifier: trained on these very images, so that their labels are not "
                    "compared; --path_to_train CSV trains it on others"
                )
            whole = ImageSet.whole(source)
            found = features.train_classifier(whole, str(source.path), settings)
        return report.report_reconstructions(
            tokenizer.model, dataset, found, lpips, settings, compare_labels=new
        )

    protocol = {"rows": ALL_ROWS, "tokenizer_sha256": tokenizer.sha256, "lpips": lpips_protocol}
    place = dataset.path, tokenizer.home, tokenizer.provenance.run_id
    run_evaluation(flags, evaluate, place, data, protocol)


def evaluate_samples(flags: argparse.Namespace, settings: Settings) -> None:
    network = inputs.open_network(flags.features, flags.feature_weights, settings.device)
    tokenizer = load_model(flags.model_dir, VQVAE, settings.device) if flags.model_dir else None
    samples = inputs.read_samples(flags, tokenizer)
    options: dict[str, Any] = {}
    if tokenizer is not None:  # real images are read like the files that it was trained on
        wanted = "value_range", "resampling"
        options = {name: getattr(tokenizer.model.config, name) for name in wanted}
    real = inputs.read_real(flags, samples.images.images, samples.split, **options)
    data: dict[str, Any] = {"path_to_data": real.train.images}
    data |= {"path_to_test": real.held_out.images} if flags.path_to_test else {}
    data |= {"images": samples.images.images} if flags.images else {}

    evaluate = partial(report.report_samples, network, real, samples, settings)
    run_id = inputs.sampling_run(samples.lineage)
    home = tracking.home_of(flags.run_id or run_id) or samples.place.parent
    protocol = {"split": real.split, **samples.hashes}
    run_evaluation(flags, evaluate, (samples.place, home, run_id), data, protocol)


@torch.inference_mode()
def encode_conditions(
    flags: argparse.Namespace, vocabulary: Vocabulary, device: torch.device
) -> Tensor | None:
    """The conditions of a CSV's images, (N, hc, wc); None for a GPT without conditions."""
    address, gpt = flags.condition_model_dir, f"the GPT in {flags.model_path}"
    if vocabulary.condition is None:
        if address:
            raise UserError(f"{gpt} takes no conditions; leave out --condition_model_dir")
        return None
    if not address:
        raise UserError(
            f"{gpt} takes conditions; give their tokenizer by --condition_model_dir, and their "
            "pictures in a column condition_path"
        )
    if flags.skip_bad_images:
        raise UserError(
            "--skip_bad_images cannot be combined with --condition_model_dir: a skipped picture "
            "leaves its image without a condition; take both out of the CSV"
        )
    tokenizer = load_model(address, VQVAE, device)
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


def evaluate_likelihood(flags: argparse.Namespace, settings: Settings) -> None:
    gpt = load_model(flags.model_path, GPT, settings.device)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    tokenizer = load_model(flags.model_dir, VQVAE, settings.device)
    config = tokenizer.model.config
    vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, config)
    dataset = inputs.read_images(flags, "path_to_data", **config.image_options)
    labels = ["" if flags.unconditional else row.label for row in dataset.rows]
    conditions = encode_conditions(flags, vocabulary, settings.device)
    prefix = make_prefix(torch.tensor(vocabulary.tokens(labels)), conditions)
    tokens_per_pixel = config.depth * math.prod(config.latent_dim) / math.prod(config.image_size)

    def nats_per_token(given: Tensor, images: Tensor) -> Tensor:
        return gpt.model.loss(given, tokenizer.model.encode(images))

    evaluate = partial(
        report.report_likelihood, nats_per_token, dataset, prefix, tokens_per_pixel, settings
    )
    protocol = {"rows": ALL_ROWS, "unconditional": flags.unconditional}
    protocol |= {"gpt_sha256": gpt.sha256, "tokenizer_sha256": tokenizer.sha256}
    place = dataset.path, gpt.home, gpt.provenance.run_id
    run_evaluation(flags, evaluate, place, {"path_to_data": dataset}, protocol)


# --- two records compared -----------------------------------------------------------------------


def find_records(place: str) -> dict[str, Path]:
    """The records of a JSON file, a folder or its evaluation/, or an MLflow run by its id.

    Returns the files by `<name>/<kind>` where each evaluation has its own folder, else by kind.
    """
    path = Path(place)
    if not path.exists():
        path = addresses.fetch(f"runs:/{place}/{report.FOLDER}")
    if path.suffix == ".json" and path.is_file():
        return {path.stem: path}
    homes = [home for home in (path, path / report.FOLDER) if home.is_dir()]
    # One level deeper only in evaluation/: a training has a folder of tables, one of the same name.
    found = {
        str(file.relative_to(home).with_suffix("")): file
        for home in homes
        for pattern in ("*.json", *(["*/*.json"] if home.name == report.FOLDER else []))
        for file in sorted(home.glob(pattern))
        if file.stem in KINDS
    }
    if not found:
        raise UserError(
            f"no evaluation at {place}; give a JSON of evaluate.py, its folder, or the id of an "
            "evaluated run"
        )
    return found


def compare_all(first: dict[str, Path], second: dict[str, Path]) -> str:
    """`compare` all records that both have by one name, or else the only ones of a kind."""
    common = {name: (first[name], second[name]) for name in first if name in second}
    if not common:
        for kind in KINDS:
            pair = [[f for f in part.values() if f.stem == kind] for part in (first, second)]
            if len(pair[0]) == len(pair[1]) == 1:
                common[kind] = pair[0][0], pair[1][0]
    if not common:
        raise UserError(
            f"nothing to compare: there are {', '.join(first)} here, and {', '.join(second)} there"
        )
    return "\n".join(f"{name}\n{compare(*pair)}" for name, pair in common.items())


def compare(first: Path, second: Path) -> str:
    """Both records side by side, and whether each difference is larger than the noise.

    Where both evaluated the same images one by one, the difference is taken image by image.
    """
    (one, images), (other, other_images) = read_record(first), read_record(second)
    protocols = one["protocol"], other["protocol"]
    # Bits are per token of one tokenizer.
    needed = (*COMPARED, *(("tokenizer_sha256",) if "unconditional" in protocols[0] else ()))
    for key in needed:
        a, b = (protocol.get(key) for protocol in protocols)
        if a != b:
            raise UserError(
                f"these evaluations cannot be compared: {key} is {a} against {b}; evaluate both by "
                "one protocol"
            )
    lines = [f"{'':>28}  {'A':>10} {'B':>10} {'B - A':>10} {'+-':>10}"]
    values, others = one["metrics"], other["metrics"]
    for key in (key for key in values if key in others):
        a, b = values[key]["value"], others[key]["value"]
        noise = math.hypot(values[key]["standard_error"], others[key]["standard_error"])
        paired = "mse" if key == "psnr" else key  # a function of the MSE, with its noise
        common = paired in images and paired in other_images
        if common and len(images) > 1 and images.index.equals(other_images.index):
            noise = float((other_images[paired].values - images[paired].values).std(ddof=1))
            noise /= math.sqrt(len(images))
            if key == "psnr":  # along the line between the two
                x, y = values["mse"]["value"], others["mse"]["value"]
                noise *= abs((b - a) / (y - x) if x != y else 10 / math.log(10) / max(x, 1e-20))
        verdict = (
            "larger than the noise" if abs(b - a) > metrics.WIDTH * noise else "within the noise"
        )
        numbers = f"{b - a:10.3g} {metrics.WIDTH * noise:10.3g}  {verdict}"
        if key == "lpips" and protocols[0].get("lpips") != protocols[1].get("lpips"):
            numbers = " not comparable: other networks"
        lines.append(f"{distances.title(key):>28}  {a:10.5g} {b:10.5g} {numbers}")
    return "\n".join(lines)


def read_record(path: Path) -> tuple[dict[str, Any], Any]:
    """A JSON file of evaluate.py, and the metrics of single images in the CSV beside it."""
    import pandas

    record, table = read_json(path), path.with_suffix(".csv")
    if not isinstance(record.get("metrics"), dict) or not isinstance(record.get("protocol"), dict):
        raise UserError(f"{path} is not a valid evaluation of evaluate.py")
    if not table.is_file():
        return record, pandas.DataFrame()
    rows = pandas.read_csv(table, keep_default_na=False, dtype={"image_path": str, "label": str})
    rows = rows.set_index(["image_path", "label"]).sort_index(kind="stable")
    return record, rows[[key for key in rows if key in PAIRED]]


# --- flags ----------------------------------------------------------------------------------------


def main(flags: argparse.Namespace) -> None:
    """Compare two evaluations, or make one."""
    if flags.compare and flags.kind:
        raise UserError("--compare reads two evaluations and makes none; give it by itself")
    if flags.compare:
        print(compare_all(*map(find_records, flags.compare)))
    elif flags.kind is None:
        raise UserError(
            "nothing to do; give reconstructions, samples or likelihood, or --compare RUN_A RUN_B"
        )
    else:
        device = distributed.pick_device(flags.device)
        flags.evaluate(flags, Settings(device, flags.batch_size, flags.seed))


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
