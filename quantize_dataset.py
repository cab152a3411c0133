"""Stage 2: turn every image of a CSV into a grid of codebook indices."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from utils import checkpoint, cli, metrics, processes, tracking
from utils.images import ImageDataset
from utils.indices import IndicesMeta, check_writable, write_indices
from utils.table import split_rows
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


def main(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    tokenizer = checkpoint.load_model(
        tracking.fetch(arguments.model_dir), VQVAE, VQVAEConfig, device
    )
    config, origin = tokenizer.model.config, tokenizer.provenance
    dataset = ImageDataset(
        arguments.path_to_data,
        size=config.image_size,
        channels=config.in_channels,
        allow_outside_paths=arguments.allow_outside_paths,
        num_workers=arguments.num_workers,
    )
    name = f"indices/{Path(arguments.path_to_data).stem}"
    output_dir = Path(arguments.output_dir or tokenizer.home / name)
    check_writable(output_dir)
    run = tracking.continue_run(
        output_dir.parent,
        arguments.run_id,
        origin.run_id,
        stage="indices",
        inputs={
            arguments.path_to_data: checkpoint.sha256(Path(arguments.path_to_data)),
            arguments.model_dir: tokenizer.sha256,
        },
        upstream=tokenizer.lineage,
    )
    print(dataset)

    with run:
        indices = quantize(tokenizer.model, dataset, arguments.batch_size)
        # Without a split column the images are split as they were for the tokenizer, whose
        # validation images are then new to the transformer, too.
        splits = split_rows(dataset.rows, val_fraction=origin.val_fraction, seed=origin.seed)
        rows = [row._replace(split="train") for row in dataset.rows]
        for row in splits[1].tolist():
            rows[row] = rows[row]._replace(split="val")
        meta = IndicesMeta(
            codebook_size=config.codebook_size,
            latent_dim=config.latent_dim,
            depth=config.depth,
            tokenizer_sha256=tokenizer.sha256,
            tokenizer_run_id=origin.run_id,
            lineage=run.lineage,
        )
        write_indices(output_dir, indices, rows, meta, text=arguments.text)
        run.folder(output_dir, name)

    counts = tokenizer.model.quantizer.count(indices)
    health = metrics.codebook_metrics(counts)
    print(
        f"{len(indices):,} grids of {'x'.join(map(str, indices.shape[1:]))} in {output_dir}: "
        f"{health['codebook_usage']:.1f} % of {config.num_codes} codes in use, "
        f"{metrics.entropy(counts):.3f} bits per token (unigram)"
    )
    print(
        cli.next_command("train.py", "--path_to_data", output_dir, "--model_dir", tokenizer.folder)
    )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--model_dir", required=True, help="tokenizer: a folder, or runs:/<run id>/checkpoints"
    )
    parser.add_argument(
        "--path_to_data", required=True, metavar="CSV", help="CSV of the images to quantize"
    )
    parser.add_argument("--run_id", help="MLflow run to log to (default: the tokenizer's)")
    parser.add_argument(
        "--output_dir",
        help="indices folder to write (default: indices/<CSV name> beside the tokenizer)",
    )
    parser.add_argument("--text", action="store_true", help="also write indices.txt")
    parser.add_argument(
        "--allow_outside_paths",
        action="store_true",
        help="accept image paths that leave the folder of the CSV",
    )
    cli.add_inference_flags(parser, batch_size=128)
    parser.add_argument(
        "--num_workers", type=int, default=-1, help="processes that decode; -1: one a core"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
