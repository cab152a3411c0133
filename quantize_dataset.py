"""Stage 2: turn every image of a data set into a grid of codebook indices."""

from utils.cli import start_script

if __name__ == "__main__":
    start_script()

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils import cli, distributed, files, tracking
from utils.data import indices, sources
from utils.data.images import Augmentation, ImageConfig, ImageDataset
from utils.data.index_dataset import CONDITION, CROPS
from utils.data.sources import Rows, column_of, split_rows
from utils.data.vocabulary import GridMeta
from utils.distributed import Distributed
from utils.evaluation import metrics
from utils.evaluation.features import ImageSet, Settings
from utils.progress import warn
from utils.provenance import LoadedModel, Provenance, load_model
from vqvae import VQVAE


@torch.inference_mode()
def quantize(
    model: VQVAE, images: ImageSet, settings: Settings, *crops: Augmentation, flip: bool = False
) -> Tensor:
    """Images, or crops of each, as indices (N, views, h, w[, depth]), int32.

    With `flip`, their mirror images follow. Each process encodes a part of the images.
    """

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        views = (pixels, pixels.flip(3)) if flip else (pixels,)
        return {"grids": torch.stack([model.encode(view).int() for view in views], dim=1)}

    found = [images.map(settings, "", encode, crop)["grids"] for crop in crops or (None,)]
    return torch.stack(found, dim=2).flatten(1, 2)


def make_shards(
    folder: Path,
    parts: Sequence[Tensor],
    sizes: Mapping[str, int],
    make: Callable[[Tensor], Mapping[str, Tensor]],
    made_from: str,
    group: Distributed,
) -> Path:
    """Write arrays in shards into a temporary folder; returns that folder.

    `make` gives the rows of a part in each array that `sizes` names, with the size of its codebook.
    All processes make each shard together, and take turns in writing it. Shards that an interrupted
    command finished are kept if they are intact and `made_from` the same.
    """
    staging = group.on_main(partial(files.resume_staging, folder, made_from))

    def paths(number: int) -> dict[str, Path]:
        return {name: indices.shard_path(staging, name, number, len(parts)) for name in sizes}

    def is_finished(number: int) -> bool:
        return all(map(files.is_sealed, paths(number).values()))

    todo = group.on_main(lambda: [n for n in range(len(parts)) if not is_finished(n)])
    if len(todo) < len(parts):
        group.print(f"{len(parts) - len(todo)} of {len(parts)} shards were finished before")
    for number in todo:
        arrays = make(parts[number])
        for name, path in paths(number).items() if number % group.world_size == group.rank else ():
            with files.disk_errors(folder):
                indices.save_grids(path, arrays[name], sizes[name])
                files.seal(path)
    group.all_gather(None)  # all have written theirs
    return staging


def check_flags(arguments: argparse.Namespace) -> None:
    """A UserError for flags that would separate an image from its condition."""
    for name in ("skip_bad_images", "crops", "flip"):
        if arguments.condition_model_dir is not None and getattr(arguments, name):
            raise cli.UserError(
                f"--{name} cannot be combined with --condition_model_dir, because an image and its "
                "condition belong together; leave one of them out"
            )


def load_condition_tokenizer(address: str, device: torch.device) -> LoadedModel:
    """The tokenizer of the conditions; a UserError for a depth above 1."""
    tokenizer = load_model(address, VQVAE, device)
    depth = tokenizer.model.config.depth
    if depth > 1:
        raise cli.UserError(
            f"the tokenizer {tokenizer.folder} has depth {depth}, but conditions have depth 1; "
            "give --condition_model_dir a tokenizer that is not residual"
        )
    return tokenizer


def grid_meta(tokenizer: LoadedModel) -> GridMeta:
    """The codebook, the size and the tokenizer of its grids."""
    config = tokenizer.model.config
    origin = tokenizer.sha256, tokenizer.provenance.run_id
    return GridMeta(config.codebook_size, config.latent_dim, *origin, config.depth)


def with_splits(rows: Rows, origin: Provenance) -> Rows:
    """The rows with a split, by default the tokenizer's: its validation images are new to a GPT."""
    splits = ["train"] * len(rows)
    for row in split_rows(rows, val_fraction=origin.val_fraction, seed=origin.seed)[1].tolist():
        splits[row] = "val"
    return Rows({**rows.columns, "split": splits})


def main(arguments: argparse.Namespace) -> None:
    check_flags(arguments)
    group = distributed.init_distributed(arguments.device, arguments.seed)
    arguments.stream |= group.world_size > 1  # each process decodes its own images only
    reading = cli.read_flags(ImageConfig, arguments)
    device, data = group.device, arguments.path_to_data
    settings = Settings(device, arguments.batch_size, arguments.seed, group)
    tokenizer = load_model(arguments.model_dir, VQVAE, device)
    model, config, origin = tokenizer.model, tokenizer.model.config, tokenizer.provenance
    name = f"indices/{Path(data).stem}"
    output_dir = Path(arguments.output_dir or tokenizer.home / name)
    if group.is_main:
        files.check_unused(output_dir, indices.META)
    dataset = ImageDataset(data, reading, **config.image_options)
    sizes, second, extra = {"indices": config.codebook_size}, None, ""
    images = larger = dataset  # of conditions, and of crops
    # Each crop is a function of seed, row and its number.
    crops = [Augmentation(False, True, arguments.seed, epoch=n) for n in range(arguments.crops)]
    if arguments.condition_model_dir is not None:
        second = load_condition_tokenizer(arguments.condition_model_dir, device)
        condition = second.model.config
        options = condition.image_options
        images = ImageDataset(data, reading, column="condition_path", **options)
        sizes[CONDITION] = condition.codebook_size
        extra = f"; conditions of {'x'.join(map(str, condition.latent_dim))}"
    elif more := 2 * max(len(crops), 1) if arguments.flip else len(crops):
        if crops:
            larger = ImageDataset(data, reading, random_crop=True, **config.image_options)
        sizes[CROPS] = config.codebook_size
        extra = f"; and {more} more of each"
    inputs = {data: sources.digest(dataset.path), arguments.model_dir: tokenizer.sha256}
    run = tracking.continue_run(
        output_dir,
        arguments.run_id,
        origin.run_id,
        stage="indices",
        inputs=inputs,
        upstream=tokenizer.lineage,
        enabled=group.is_main,
    )
    print(dataset)
    if arguments.flip and any(column_of(dataset.rows, "caption")):
        warn("--flip: captions of mirrored images are wrong where they name a side")
    meta = indices.IndicesMeta(
        **vars(grid_meta(tokenizer)),
        lineage=run.lineage,
        condition=second and grid_meta(second),
    )

    def make(rows: Tensor) -> dict[str, Tensor]:
        """All arrays of some rows."""
        found = {"indices": quantize(model, ImageSet(dataset, rows), settings)[:, 0]}
        if second is not None:
            found[CONDITION] = quantize(second.model, ImageSet(images, rows), settings)[:, 0]
        if CROPS in sizes:
            part, flip = ImageSet(larger, rows), arguments.flip
            found[CROPS] = quantize(model, part, settings, *crops, flip=flip)
        return found

    with run:
        parts = indices.shard_rows(len(dataset), meta, arguments.images_per_shard)
        flags = {name: str(getattr(arguments, name)) for name in ("crops", "flip", "seed")}
        about = [*inputs.values()], second and second.sha256, dataset.skipped, flags, len(parts[0])
        staging = make_shards(output_dir, parts, sizes, make, json.dumps(about), group)
        if group.is_main:
            rows = with_splits(dataset.rows, origin)
            with indices.new_folder(output_dir, rows, meta, text=arguments.text, staging=staging):
                pass
            dataset.write_skipped(output_dir)
            run.folder(output_dir, name)
    if group.is_main:
        grids = indices.read_indices(output_dir, depth=None).grids
        counts = sum(model.quantizer.count(grids[rows].int()) for rows in parts)
        perplexity = metrics.codebook_metrics(counts)["perplexity"]
        print(
            f"{len(grids):,} grids of {'x'.join(map(str, grids.shape[1:]))} in {output_dir}: "
            f"{int((counts > 0).sum()):,} of {len(counts):,} codes in use, "
            f"{math.log2(perplexity / config.depth):.3f} bits per token "
            f"(entropy of single indices){extra}"
        )
    words = ("train.py", "--path_to_data", output_dir, "--model_dir", arguments.model_dir)
    print(cli.next_command(*words))
    group.shutdown()


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    images = "images to quantize: a CSV, or a folder with a folder of images for each class"
    add("--model_dir", required=True, help="tokenizer: a folder, or runs:/<run id>/checkpoints")
    add("--path_to_data", required=True, metavar="DATA", help=images)
    condition = "tokenizer of the images in the column condition_path, the conditions of the GPT"
    add("--condition_model_dir", help=f"{condition} (default: no conditions)")
    add("--run_id", help="MLflow run to log to (default: the tokenizer's)")
    folder = "indices folder to write (default: indices/<CSV name> beside the tokenizer)"
    add("--output_dir", help=folder)
    crops = (
        "also quantize N random crops of each image, an eighth larger; train.py then uses another "
        "of them in every epoch, and validates on the whole images (default: none)"
    )
    add("--crops", type=cli.positive, default=0, metavar="N", help=crops)
    flip = "also quantize mirror images: of the crops, or else of each image"
    add("--flip", action="store_true", help=flip)
    add("--seed", type=int, default=0, help="of the crops (default: 0)")
    add("--text", action="store_true", help="also write indices.txt")
    size = (
        "images in a file of indices, about; after a kill, the same command continues with the "
        "first file that is not finished (default: 64 MiB of indices)"
    )
    add("--images_per_shard", type=cli.positive, default=0, metavar="N", help=size)
    cli.add_inference_flags(parser, batch_size=128)
    cli.add_flags(parser, ImageConfig, "images")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), distributed.is_first_to_fail)
