"""Stage 2: turn every image of a CSV into a grid of codebook indices."""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from utils import cli, distributed, tracking
from utils.data.augmentation import Augmentation
from utils.data.conditions import write_conditions
from utils.data.crops import FILE
from utils.data.grid_meta import GridMeta
from utils.data.images import ImageDataset
from utils.data.index_folder import allocate
from utils.data.indices import IndicesMeta, check_writable, write_indices
from utils.data.table import Row, split_rows
from utils.evaluation import metrics
from utils.files import sha256
from utils.model_folder import load_model
from utils.provenance import LoadedModel, Provenance
from vqvae import VQVAE, VQVAEConfig


def quantize(model: VQVAE, dataset: ImageDataset, batch_size: int) -> torch.Tensor:
    """All images of a data set as indices (N, h, w[, depth]), int32, on the CPU."""
    device = next(model.parameters()).device
    batches = torch.arange(len(dataset)).split(batch_size)
    grids = []
    with torch.inference_mode(), tqdm(total=len(dataset), unit=" images", disable=None) as bar:
        for images in dataset.batches(batches, device):
            grids.append(model.encode(images).to("cpu", torch.int32))
            bar.update(len(images))
    return torch.cat(grids)


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before anything is read.

    Raises:
        UserError: a picture and its condition would not stay alike.
    """
    if arguments.condition_model_dir is None:
        return
    if arguments.skip_bad_images:
        raise cli.UserError(
            "--skip_bad_images does not go with --condition_model_dir: a picture and its condition "
            "come and go together; take both out of the CSV"
        )
    if grids_per_image(arguments.crops, arguments.flip):
        raise cli.UserError(
            "--crops and --flip do not go with --condition_model_dir, whose pictures would have to "
            "be cropped alike; omit one of them"
        )


def grids_per_image(crops: int, flip: bool) -> int:
    """How many grids of each image there are besides its own: crops, each perhaps mirrored, too.

    Without crops the image itself is mirrored.
    """
    return 2 * max(crops, 1) if flip else crops


@torch.inference_mode()
def quantize_crops(
    folder: Path,
    model: VQVAE,
    dataset: ImageDataset,
    meta: IndicesMeta,
    *,
    crops: int,
    flip: bool,
    batch_size: int,
    seed: int,
) -> None:
    """Write crops.npy, (N, grids, h, w[, depth]): random crops, and with `flip` then them mirrored.

    Args:
        folder: an indices folder.
        model: the tokenizer.
        dataset: of images that are larger than the crops, or else of the images themselves.
        meta: of the folder.
        crops: of each image; 0: the image itself.
        flip: also the mirror image of each.
        batch_size: images at once.
        seed: a crop is a function of seed, row and its number.
    """
    device = next(model.parameters()).device
    shape = len(dataset), grids_per_image(crops, flip), *meta.shape
    array = allocate(folder / FILE, shape, meta.codebook_size)
    views = max(crops, 1)
    batches = torch.arange(len(dataset)).split(batch_size)
    with tqdm(total=views * len(dataset), unit=" crops", disable=None) as bar:
        for view in range(views):
            cut = Augmentation(False, dataset.canvas != dataset.size, seed, epoch=view)
            for rows, images in zip(batches, dataset.batches(batches, device, cut), strict=True):
                array[rows, view] = model.encode(images).cpu()
                if flip:
                    array[rows, views + view] = model.encode(images.flip(3)).cpu()
                bar.update(len(rows))


def read_images(
    arguments: argparse.Namespace, config: VQVAEConfig, column: str = "image_path", **options: bool
) -> ImageDataset:
    """The files in a column of the CSV, as a tokenizer takes them."""
    return ImageDataset(
        arguments.path_to_data,
        column=column,
        size=config.image_size,
        channels=config.in_channels,
        **cli.image_options(arguments),
        **options,
    )


def load_condition_tokenizer(address: str | None, device: torch.device) -> LoadedModel | None:
    """The tokenizer of the conditions, where there are any.

    Raises:
        UserError: it has several indices a cell.
    """
    if address is None:
        return None
    tokenizer = load_model(address, VQVAE, device)
    depth = tokenizer.model.config.depth
    if depth > 1:
        raise cli.UserError(
            f"the tokenizer {tokenizer.folder} makes {depth} indices a cell, but conditions have "
            "one; give --condition_model_dir a tokenizer that is not residual"
        )
    return tokenizer


def grid_meta(tokenizer: LoadedModel) -> GridMeta:
    """What the grids of a tokenizer belong to."""
    return GridMeta(
        codebook_size=tokenizer.model.config.codebook_size,
        latent_dim=tokenizer.model.config.latent_dim,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_run_id=tokenizer.provenance.run_id,
    )


def split(dataset: ImageDataset, origin: Provenance) -> list[Row]:
    """The rows of the images, each with its split.

    Without a split column the images are split as they were for the tokenizer, whose validation
    images are then new to the transformer, too.
    """
    _, val_rows = split_rows(
        dataset.rows,
        val_fraction=origin.val_fraction,
        seed=origin.seed,
        folder=dataset.path.parent,
    )
    rows = [row._replace(split="train") for row in dataset.rows]
    for row in val_rows.tolist():
        rows[row] = rows[row]._replace(split="val")
    return rows


def main(arguments: argparse.Namespace) -> None:
    check_flags(arguments)
    device = distributed.pick_device(arguments.device)
    tokenizer = load_model(arguments.model_dir, VQVAE, device)
    second = load_condition_tokenizer(arguments.condition_model_dir, device)
    config, origin = tokenizer.model.config, tokenizer.provenance
    name = f"indices/{Path(arguments.path_to_data).stem}"
    output_dir = Path(arguments.output_dir or tokenizer.home / name)
    check_writable(output_dir)
    dataset = read_images(arguments, config)
    pictures = second and read_images(arguments, second.model.config, "condition_path")
    run = tracking.continue_run(
        output_dir.parent,
        arguments.run_id,
        origin.run_id,
        stage="indices",
        part=output_dir.name,
        inputs={
            arguments.path_to_data: sha256(Path(arguments.path_to_data)),
            arguments.model_dir: tokenizer.sha256,
        },
        upstream=tokenizer.lineage,
    )
    print(dataset)

    with run:
        indices = quantize(tokenizer.model, dataset, arguments.batch_size)
        meta = IndicesMeta(
            codebook_size=config.codebook_size,
            latent_dim=config.latent_dim,
            depth=config.depth,
            tokenizer_sha256=tokenizer.sha256,
            tokenizer_run_id=origin.run_id,
            lineage=run.lineage,
            condition=second and grid_meta(second),
        )
        more, extra, add = grids_per_image(arguments.crops, arguments.flip), "", None
        if second is not None:
            grids = quantize(second.model, pictures, arguments.batch_size)
            add = partial(
                write_conditions, conditions=grids, codebook_size=meta.condition.codebook_size
            )
            extra = f"; conditions of {'x'.join(map(str, grids.shape[1:]))}"
        elif more:
            larger = dataset
            if arguments.crops:
                larger = read_images(arguments, config, random_crop=True)
            add = partial(
                quantize_crops,
                model=tokenizer.model,
                dataset=larger,
                meta=meta,
                crops=arguments.crops,
                flip=arguments.flip,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
            )
            extra = f"; and {more} more of each"
        rows = split(dataset, origin)
        write_indices(output_dir, indices, rows, meta, text=arguments.text, add=add)
        dataset.write_skipped(output_dir)
        run.folder(output_dir, name)

    counts = tokenizer.model.quantizer.count(indices)
    health = metrics.codebook_metrics(counts)
    print(
        f"{len(indices):,} grids of {'x'.join(map(str, indices.shape[1:]))} in {output_dir}: "
        f"{health['codebook_usage']:.1f} % of {config.num_codes} codes in use, "
        f"{math.log2(health['perplexity'] / config.depth):.3f} bits per token "
        f"(entropy of single indices){extra}"
    )
    print(
        cli.next_command(
            *("train.py", "--path_to_data", output_dir, "--model_dir", arguments.model_dir)
        )
    )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--model_dir", required=True, help="tokenizer: a folder, or runs:/<run id>/checkpoints"
    )
    parser.add_argument(
        "--path_to_data", required=True, metavar="CSV", help="CSV of the images to quantize"
    )
    parser.add_argument(
        "--condition_model_dir",
        help="tokenizer of the pictures in the column condition_path, which the GPT is given "
        "before the image (default: there are none)",
    )
    parser.add_argument("--run_id", help="MLflow run to log to (default: the tokenizer's)")
    parser.add_argument(
        "--output_dir",
        help="indices folder to write (default: indices/<CSV name> beside the tokenizer)",
    )
    parser.add_argument(
        "--crops",
        type=cli.positive,
        default=0,
        metavar="N",
        help="also quantize N random crops of each image, an eighth larger; train.py then takes "
        "another of them in every epoch, and validates on the whole images (default: none)",
    )
    parser.add_argument(
        "--flip",
        action="store_true",
        help="also quantize mirror images: of the crops, or else of each image",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: 0)")
    parser.add_argument("--text", action="store_true", help="also write indices.txt")
    cli.add_inference_flags(parser, batch_size=128)
    cli.add_image_flags(parser)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
