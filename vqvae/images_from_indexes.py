"""Stage 5: turn grids of codebook indices into images: PNG files and one grid of them all."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.cli import start_script

if __name__ == "__main__":
    start_script()

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from utils import addresses, cli, distributed, figures, provenance, tracking
from utils.data.images import ImageConfig, ImageDataset
from utils.data.index_dataset import read_conditions
from utils.data.indices import Indices, digest, lineage_of, read_indices
from utils.data.masks import KnownPixels
from utils.data.sources import column_of
from utils.data.sources.csv import write_table
from utils.distributed import Distributed
from utils.files import choose_output_dir
from utils.progress import ProgressBar
from utils.provenance import load_model
from vqvae import VQVAE

SHOWN = 100  # images in the grid, at most
LIST, NPZ = "images.csv", "samples.npz"


def prepare(folder: Path) -> None:
    """Make the folder, and remove the images of an earlier call."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*folder.glob("[0-9]*.png"), folder / "grid.png", folder / LIST, folder / NPZ):
        file.unlink(missing_ok=True)


@torch.inference_mode()
def decode_conditions(address: str, path: Path, indices: Indices, device: torch.device) -> Tensor:
    """The conditions of the first images, at most SHOWN, as images (N, C, H, W) in [-1, 1]."""
    conditions = read_conditions(path, indices)
    if conditions is None or indices.meta.condition is None:
        raise cli.UserError(f"{path} has no conditions; leave out --condition_model_dir")
    tokenizer = load_model(address, VQVAE, device)
    owner = f"the condition of {path}"
    indices.meta.condition.check_tokenizer(tokenizer.sha256, tokenizer.folder, owner=owner)
    return tokenizer.model.decode(conditions[:SHOWN].long().to(device)).cpu()


def make_decoder(
    arguments: argparse.Namespace, model: VQVAE, path: Path
) -> Callable[[Tensor, Tensor], Tensor]:
    """Grids (B, h, w[, depth]) and their row numbers -> images (B, C, H, W), on the CPU.

    With --path_to_data, the known pixels of completed images are those of the originals.
    """
    known, device = KnownPixels.load(path), next(model.parameters()).device
    data = None
    if known is not None and arguments.path_to_data:
        reading = cli.read_flags(ImageConfig, arguments)
        data = ImageDataset(arguments.path_to_data, reading, **model.config.image_options)
        numbers = known.rows_in(data)
    elif arguments.path_to_data:
        raise cli.UserError(f"{path} holds no completed images; omit --path_to_data")
    elif arguments.feather:
        raise cli.UserError("--feather has no effect without --path_to_data; add it")
    elif known is not None:
        print("hint: --path_to_data DATA puts the known pixels of the completed images back")

    def decode(grids: Tensor, rows: Tensor) -> Tensor:
        images = model.decode(grids.long().to(device)).cpu()
        if known is None or data is None:
            return images
        originals = next(iter(data.batches([numbers[rows]], images.device)))
        return known.blend(images, originals, rows, arguments.feather)

    return decode


@torch.inference_mode()
def write_images(
    folder: Path,
    decode: Callable[[Tensor, Tensor], Tensor],
    indices: Indices,
    flags: argparse.Namespace,
    metadata: PngInfo,
    group: Distributed,
) -> Tensor:
    """Write all images as PNG files, each process a part; the first SHOWN images (N, C, H, W)."""
    count, shown = len(indices.grids), []
    names = [f"{number:05}.png" for number in range(count)]
    batches = torch.arange(count)[group.block(count, flags.batch_size)].split(flags.batch_size)
    for rows in ProgressBar(batches, unit=" batches"):
        images = decode(indices.grids[rows], rows)
        for number, image in zip(rows.tolist(), images, strict=True):
            figures.to_pil(image).save(folder / names[number], pnginfo=metadata)
        shown.append(images[rows < SHOWN])
    first = group.join(torch.cat(shown))
    if not group.is_main:
        return first
    columns = {"image_path": names, "label": column_of(indices.rows, "label")}
    if any(captions := column_of(indices.rows, "caption")):
        columns["caption"] = captions
    write_table(folder / LIST, [*columns], zip(*columns.values(), strict=True))
    if flags.npz:  # as OpenAI's guided-diffusion evaluates: arr_0
        pictures = (Image.open(folder / name).convert("RGB") for name in names)
        np.savez(folder / NPZ, np.stack([np.asarray(picture) for picture in pictures]))
    return first


def main(arguments: argparse.Namespace) -> None:
    group = distributed.init_distributed(arguments.device, 0)
    arguments.stream |= group.world_size > 1  # each process decodes its own images only
    device = group.device
    tokenizer = load_model(arguments.model_dir, VQVAE, device)
    path = addresses.fetch(arguments.indexes_path)
    config, origin = tokenizer.model.config, tokenizer.provenance
    if arguments.npz and config.in_channels == 4:
        raise cli.UserError("--npz holds no transparency, which these images have; omit it")
    codes = {"codebook_size": config.codebook_size, "depth": config.depth}
    indices = read_indices(path, latent_dim=arguments.latent_dim, **codes)
    indices.meta.check_tokenizer(tokenizer.sha256, tokenizer.folder, owner=path)
    conditions = None
    if arguments.condition_model_dir:
        conditions = decode_conditions(arguments.condition_model_dir, path, indices, device)
    decode = make_decoder(arguments, tokenizer.model, path)
    default = path.with_name(f"{path.stem}-images")
    choose = partial(choose_output_dir, arguments.output_dir, default, LIST)
    output_dir = group.on_main(choose)
    run = tracking.continue_run(
        output_dir,
        arguments.run_id,
        indices.meta.gpt_run_id or origin.run_id,
        stage="images",
        inputs={arguments.indexes_path: digest(path), arguments.model_dir: tokenizer.sha256},
        upstream=provenance.joined(tokenizer.lineage, lineage_of(path)),
        enabled=group.is_main,
    )
    metadata = provenance.png_info(run.lineage, origin.split)
    group.on_main(partial(prepare, output_dir))  # only now that nothing can be refused any more
    with run:
        first = write_images(output_dir, decode, indices, arguments, metadata, group)
        picture = figures.grid(first) if conditions is None else figures.pairs(conditions, first)
        if group.is_main:
            picture.save(output_dir / "grid.png", pnginfo=metadata)
        run.file(output_dir / "grid.png", f"generated/{output_dir.name}")
        run.picture("pictures/generated", picture, 0)
    count = len(indices.rows)
    print(f"{count:,} images in {output_dir}, the first of them in {output_dir / 'grid.png'}")
    print(run.ui_hint)
    group.shutdown()


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--indexes_path", required=True, help="indices folder, or a text file of indices")
    add("--model_dir", required=True, help="tokenizer: a folder, or runs:/<run id>/checkpoints")
    shown = "tokenizer of the conditions, to show them beside the images in grid.png"
    add("--condition_model_dir", help=shown)
    data = "originals of completed images, whose known pixels are put back"
    add("--path_to_data", metavar="DATA", help=data)
    feather = "pixels over which the originals fade at the border of what was sampled (default: 0)"
    add("--feather", type=cli.positive, default=0, metavar="N", help=feather)
    grid = "grid of a text file (default: a square)"
    add("--latent_dim", type=cli.height_and_width, help=grid)
    add("--run_id", help="MLflow run to log to (default: the indices')")
    folder = "folder of PNG files (default: <indices>-images beside the indices)"
    add("--output_dir", help=folder)
    npz = f"also {NPZ}, arr_0 of uint8 (N, H, W, 3), for the evaluation of guided-diffusion (ADM)"
    add("--npz", action="store_true", help=npz)
    cli.add_inference_flags(parser, batch_size=64)
    cli.add_flags(parser, ImageConfig, "images")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), distributed.is_first_to_fail)
