"""Evaluate reconstructions of a tokenizer, samples of a GPT, or the likelihood of images."""

from utils.cli import start_script

if __name__ == "__main__":
    start_script()

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
from utils.data.captions import encode
from utils.data.conditioning import choose_embeddings
from utils.data.images import ImageConfig, ImageDataset
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.evaluation import features, inputs, metrics, report
from utils.evaluation.features import ImageSet, Settings
from utils.evaluation.metrics import IMAGE_METRICS, ImageMetric
from utils.evaluation.report import Record
from utils.files import read_json
from utils.provenance import load_model
from vqvae import VQVAE
from vqvae.losses import BACKBONES, PerceptualLoss

KINDS = ("reconstructions", "samples", "likelihood")
# What must be equal where metrics are compared.
COMPARED = (
    *("images", "size", "channels", "path_to_data_sha256", "path_to_test_sha256", "split"),
    *("training_images", "features", "network_sha256", "seed", "unconditional"),
)
ALL_ROWS = "all of path_to_data"  # in the protocol of evaluations without a split


def run_evaluation(
    flags: argparse.Namespace,
    settings: Settings,
    evaluate: Callable[[], Record],
    place: tuple[str | Path, Path, str],
    data: dict[str, ImageDataset],
    protocol: dict[str, Any],
) -> None:
    """Evaluate, write the record, and log it to the run of the model.

    `place` is what is evaluated, the folder for the record, and the run of the model; `data` are
    the images by the flags that named them.
    """
    source, home, run_id = place
    name = report.name_of(source)
    stage = "tokenizer" if flags.kind == "reconstructions" else "gpt"
    output_dir = Path(flags.output_dir or home / report.FOLDER / name)
    cli.check_writable(output_dir)
    options: Any = {"homes": (stage,), "enabled": settings.group.is_main}
    with tracking.continue_run(output_dir, flags.run_id, run_id, **options) as run:
        record = evaluate()
        if not settings.group.is_main:
            return
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
    table = dict(IMAGE_METRICS)
    protocol: dict[str, Any] = {"rows": ALL_ROWS, "tokenizer_sha256": tokenizer.sha256}
    if flags.lpips:
        lpips = cli.build_or_error(PerceptualLoss, flags.lpips, flags.lpips_weights)
        table["lpips"] = ImageMetric(lpips.to(settings.device))
        sha256 = features.weights_sha256(lpips)
        protocol["lpips"] = {"network": flags.lpips, "sha256": sha256}
    names = ("path_to_data", "path_to_train") if flags.path_to_train else ("path_to_data",)
    options = tokenizer.model.config.image_options
    data = {name: inputs.read_images(flags, name, **options) for name in names}
    dataset, training = data["path_to_data"], None
    if flags.features == "classifier":
        training = data.get("path_to_train", dataset)
        if sources.digest(training.path) == sources.digest(dataset.path):
            training = dataset
            print(
                "classifier: trained on these very images, whose labels are not compared; "
                "--path_to_train trains it on others"
            )

    evaluate = partial(
        report.report_reconstructions,
        *(tokenizer.model, dataset, table, network, training, settings),
    )
    place = dataset.path, tokenizer.home, tokenizer.provenance.run_id
    run_evaluation(flags, settings, evaluate, place, data, protocol)


def evaluate_samples(flags: argparse.Namespace, settings: Settings) -> None:
    network = inputs.open_network(flags.features, flags.feature_weights, settings.device)
    loaded = load_model(flags.model_dir, VQVAE, settings.device) if flags.model_dir else None
    samples = inputs.read_samples(flags, loaded)
    split, tokenizer, options = samples.split, None, {}
    hashes = {f"{stage.name}_sha256": stage.sha256 for stage in samples.lineage}
    if loaded is not None:  # real images are read like the files that it was trained on
        split, tokenizer = loaded.provenance.split, loaded.model
        config = tokenizer.config
        options = {"value_range": config.value_range, "resampling": config.resampling}
        hashes["tokenizer_sha256"] = loaded.sha256
    real = inputs.read_real(flags, samples.images, split, **options)
    data: dict[str, Any] = {"path_to_data": real.train.images}
    data |= {"path_to_test": real.held_out.images} if flags.path_to_test else {}
    data |= {"images": samples.images} if isinstance(samples.images, ImageDataset) else {}

    evaluate = partial(report.report_samples, network, real, samples.images, tokenizer, settings)
    # The run of the GPT that generated them, if it is known.
    run_id = {stage.name: stage.run_id for stage in samples.lineage}.get("samples", "")
    home = tracking.home_of(flags.run_id or run_id) or samples.place.parent
    protocol = {"split": real.split, "samples_sha256": samples.sha256}
    protocol |= {key: hashes.get(key) for key in ("tokenizer_sha256", "gpt_sha256")}
    run_evaluation(flags, settings, evaluate, (samples.place, home, run_id), data, protocol)


def encode_conditions(
    flags: argparse.Namespace, vocabulary: Vocabulary, settings: Settings
) -> Tensor | None:
    """The conditions of a CSV's images, (N, hc, wc); None for a GPT without conditions."""
    address, gpt = flags.condition_model_dir, f"the GPT in {flags.model_path}"
    if vocabulary.condition is None:
        if address:
            raise UserError(f"{gpt} takes no conditions; leave out --condition_model_dir")
        return None
    if not address:
        column = "their pictures in a column condition_path"
        raise UserError(f"{gpt} takes conditions; add --condition_model_dir, and {column}")
    if flags.skip_bad_images:
        bad = "--skip_bad_images cannot be combined with --condition_model_dir"
        raise UserError(f"{bad}; take bad pictures out of the CSV, with their images")
    tokenizer = load_model(address, VQVAE, settings.device)
    owner = f"the condition of {flags.model_path}"
    vocabulary.condition.check_tokenizer(tokenizer.sha256, tokenizer.folder, owner=owner)
    options = tokenizer.model.config.image_options
    pictures = inputs.read_images(flags, "path_to_data", column="condition_path", **options)
    return report.encode(tokenizer.model, ImageSet.whole(pictures), settings)


def evaluate_likelihood(flags: argparse.Namespace, settings: Settings) -> None:
    gpt = load_model(flags.model_path, GPT, settings.device)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    tokenizer = load_model(flags.model_dir, VQVAE, settings.device)
    config = tokenizer.model.config
    vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, config)
    dataset = inputs.read_images(flags, "path_to_data", **config.image_options)
    labels = ["" if flags.unconditional else row.label for row in dataset.rows]
    conditions = encode_conditions(flags, vocabulary, settings)
    captions = ["" if flags.unconditional else row.caption for row in dataset.rows]
    texts, count = encode(captions, vocabulary.captions), len(dataset)
    vectors = choose_embeddings(flags, vocabulary, count, rows=count)
    prefix = make_prefix(torch.tensor(vocabulary.tokens(labels)), conditions, vectors, texts)
    models = gpt.model, tokenizer.model
    evaluate = partial(report.report_likelihood, *models, dataset, prefix, settings)
    protocol = {"rows": ALL_ROWS, "unconditional": flags.unconditional}
    protocol |= {"gpt_sha256": gpt.sha256, "tokenizer_sha256": tokenizer.sha256}
    place = dataset.path, gpt.home, gpt.provenance.run_id
    run_evaluation(flags, settings, evaluate, place, {"path_to_data": dataset}, protocol)


def find_records(place: str) -> dict[str, Path]:
    """The records of a JSON file, a folder or its evaluation/, or an MLflow run by its id.

    Returns the files by `<name>/<kind>` where each evaluation has its own folder, else by kind.
    """
    path = Path(place)
    if not path.exists():
        path = addresses.fetch(f"runs:/{place}/{report.FOLDER}")
    if path.suffix == ".json" and path.is_file():
        return {path.stem: path}
    home = path / report.FOLDER if (path / report.FOLDER).is_dir() else path
    # Not in the folder of a training, which has a table reconstructions.json of its own.
    deeper = home.glob("*/*.json") if home.name == report.FOLDER else ()
    files = [x for x in sorted((*home.glob("*.json"), *deeper)) if x.stem in KINDS]
    if not files:
        takes = "a JSON of evaluate.py, its folder, or the id of an evaluated run"
        raise UserError(f"no evaluation at {place}; give {takes}")
    return {str(file.relative_to(home).with_suffix("")): file for file in files}


def compare_all(first: dict[str, Path], second: dict[str, Path]) -> str:
    """`compare` all records that both have by one name, or else the only ones of a kind."""
    pairs = {name: (first[name], second[name]) for name in first if name in second}
    for kind in () if pairs else KINDS:
        one, other = ([x for x in part.values() if x.stem == kind] for part in (first, second))
        if len(one) == len(other) == 1:
            pairs[kind] = one[0], other[0]
    if not pairs:
        here, there = ", ".join(first), ", ".join(second)
        raise UserError(f"nothing to compare: there are {here} here, and {there} there")
    return "\n".join(f"{name}\n{compare(*pair)}" for name, pair in pairs.items())


def compare(first: Path, second: Path) -> str:
    """Both records side by side, and whether each difference is larger than the noise.

    Where both evaluated the same images one by one, the difference is taken image by image.
    """
    import pandas

    (one, images), (other, other_images) = read_record(first), read_record(second)
    protocols = one["protocol"], other["protocol"]
    # Bits are per token of one tokenizer.
    tokenizer = ("tokenizer_sha256",) if "unconditional" in protocols[0] else ()
    for key in (*COMPARED, *tokenizer):
        a, b = (protocol.get(key) for protocol in protocols)
        if a != b:
            differs = f"these evaluations cannot be compared: {key} is {a} against {b}"
            raise UserError(f"{differs}; evaluate both by one protocol")
    rows = {}
    values, others = one["metrics"], other["metrics"]
    for key in (key for key in values if key in others):
        a, b = values[key]["value"], others[key]["value"]
        noise = math.hypot(values[key]["standard_error"], others[key]["standard_error"])
        paired = "mse" if key == "psnr" else key  # a function of the MSE, with its noise
        common = paired in images and paired in other_images
        if common and len(images) > 1 and images.index.equals(other_images.index):
            differences = other_images[paired].values - images[paired].values
            noise = float(differences.std(ddof=1)) / math.sqrt(len(images))
            if key == "psnr":  # along the line between the two
                x, y = values["mse"]["value"], others["mse"]["value"]
                slope = 10 / math.log(10) / max(x, 1e-20)
                noise *= abs((b - a) / (y - x)) if x != y else slope
        verdict = "larger than" if abs(b - a) > metrics.WIDTH * noise else "within"
        numbers = f"{b - a:.3g}", f"{metrics.WIDTH * noise:.3g}", f"{verdict} the noise"
        if key == "lpips" and protocols[0].get("lpips") != protocols[1].get("lpips"):
            numbers = "", "", "not comparable: other networks"
        rows[key] = f"{a:.5g}", f"{b:.5g}", *numbers
    heads = ("A", "B", "B - A", "+-", "")
    return pandas.DataFrame.from_dict(rows, orient="index", columns=heads).to_string()


def read_record(path: Path) -> tuple[dict[str, Any], Any]:
    """A JSON file of evaluate.py, and the table of single images in the CSV beside it."""
    import pandas

    record, table = read_json(path), path.with_suffix(".csv")
    if not all(isinstance(record.get(key), dict) for key in ("metrics", "protocol")):
        raise UserError(f"{path} is not a valid evaluation of evaluate.py")
    if not table.is_file():
        return record, pandas.DataFrame()
    names = ["image_path", "label"]
    rows = pandas.read_csv(table, keep_default_na=False, dtype=dict.fromkeys(names, str))
    return record, rows.set_index(names).sort_index(kind="stable")


def main(flags: argparse.Namespace) -> None:
    """Compare two evaluations, or make one."""
    if flags.compare and flags.kind:
        raise UserError("--compare reads two evaluations and makes none; give it alone")
    if flags.compare:
        print(compare_all(*map(find_records, flags.compare)))
    elif flags.kind is None:
        raise UserError(f"nothing to do; give {', '.join(KINDS)}, or --compare RUN_A RUN_B")
    else:
        group = distributed.init_distributed(flags.device, flags.seed)
        flags.stream |= group.world_size > 1  # each process decodes its own images only
        flags.evaluate(flags, Settings(group.device, flags.batch_size, flags.seed, group))
        group.shutdown()


def add_feature_flags(command: argparse.ArgumentParser, default: str | None) -> None:
    add, names = command.add_argument, features.NETWORKS
    network = (
        "compare sets of images in a classifier, trained on the labels of the data, Inception "
        f"(FID) or DINOv2 (default: {default or 'none'})"
    )
    weights = "weights file of Inception (default: downloads it), folder of DINOv2"
    add("--features", choices=names, default=default, help=network)
    add("--feature_weights", default="", metavar="PATH", help=weights)


def add_common_flags(command: argparse.ArgumentParser, model_dir: str = "") -> None:
    add = command.add_argument
    tokenizer = model_dir or "tokenizer: a folder, or runs:/..."
    add("--model_dir", help=tokenizer, required=not model_dir)
    add("--path_to_data", metavar="CSV", help="CSV of real images", required=True)
    add("--run_id", help="MLflow run to log to (default: the model's)")
    place = "evaluation/<folder>-<name>/ beside the model, else beside the samples"
    add("--output_dir", help=f"where the files go (default: {place})")
    add("--seed", type=int, default=0, help="of the classifier and all resamples")
    cli.add_inference_flags(command, batch_size=256)
    cli.add_flags(command, ImageConfig, "images")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    compare = "compare two evaluations: folders, JSON files or run ids"
    parser.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help=compare)
    commands = parser.add_subparsers(metavar=" | ".join(KINDS), dest="kind")
    one = commands.add_parser(KINDS[0], help="errors of a tokenizer on a CSV")
    one.set_defaults(evaluate=evaluate_reconstructions)
    add_common_flags(one)
    trains = "trains the classifier (default: --path_to_data)"
    network = "also LPIPS, through this network (default: no)"
    weights = "torchvision's weights of it (default: downloads them)"
    one.add_argument("--path_to_train", metavar="CSV", help=trains)
    one.add_argument("--lpips", choices=tuple(BACKBONES), help=network)
    one.add_argument("--lpips_weights", default="", metavar="PATH", help=weights)
    add_feature_flags(one, None)
    two = commands.add_parser(KINDS[1], help="samples beside real images")
    two.set_defaults(evaluate=evaluate_samples)
    add_common_flags(two, "tokenizer, whose reconstructions are compared, too")
    test = "images that no training has used (default: validation images of --path_to_data)"
    size = "resize and crop all images to this (default: their common size)"
    two.add_argument("--images", help="folder of images_from_indexes.py, a CSV, or an .npz")
    two.add_argument("--indexes_path", help="indices of transformer_generation.py instead")
    two.add_argument("--path_to_test", metavar="CSV", help=test)
    two.add_argument("--image_size", type=cli.height_and_width, metavar="H,W", help=size)
    add_feature_flags(two, "classifier")
    three = commands.add_parser(KINDS[2], help="rank images by likelihood")
    three.set_defaults(evaluate=evaluate_likelihood)
    add_common_flags(three)
    condition = "tokenizer of the pictures in the column condition_path"
    labels = "evaluate the GPT without the images' labels"
    three.add_argument("--model_path", required=True, help="GPT: a folder, or runs:/...")
    three.add_argument("--condition_model_dir", help=condition)
    three.add_argument("--embeddings", default="", metavar="FILE", help="vectors: .npy, Parquet")
    three.add_argument("--unconditional", action="store_true", help=labels)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), distributed.is_first_to_fail)
