"""All quantizers beside each other: the same network, data and time for each of them."""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import record
from utils import cli
from utils.data.images import ImageDataset
from utils.data.sources import epoch_order, split_rows
from utils.evaluation import metrics
from utils.training.config import TrainingConfig
from utils.training.optim import make_optimizer, optimizer_step
from vqvae import QUANTIZERS, VQVAE, VQVAEConfig

SEED = 0
# Settings by name; residual a second time, with as many bits an image as the others have.
CASES = {
    **{name: {"quantizer": name} for name in QUANTIZERS},
    "residual-3x8": {"quantizer": "residual", "codebook_size": 8, "depth": 3},
}
COLUMNS = ("quantizer", "MSE", "usage %", "perplexity", "bits an image", "images/s")


def train(model: VQVAE, dataset: ImageDataset, rows: Tensor, flags: argparse.Namespace) -> float:
    """Train for `--seconds`; the learning rate follows a cosine of time. Returns images/s."""
    optimizer = make_optimizer(
        model, TrainingConfig(learning_rate=flags.learning_rate), betas=(0.9, 0.99)
    )
    device = torch.device("cpu")
    start, done, epoch = time.perf_counter(), 0, 0
    with tqdm(total=flags.seconds, unit="s", desc=model.config.quantizer, disable=None) as bar:
        while True:
            batches = epoch_order(rows, SEED, epoch).split(flags.batch_size)
            for images in dataset.batches(batches[: len(rows) // flags.batch_size], device):
                passed = (time.perf_counter() - start) / flags.seconds
                if passed >= 1:
                    return done / (passed * flags.seconds)
                bar.update(round(passed * flags.seconds) - bar.n)
                warm_up = min(1.0, (done / flags.batch_size + 1) / 100)
                rate = flags.learning_rate * warm_up * (1 + math.cos(math.pi * passed)) / 2
                reconstruction, quantized = model(images)
                loss = F.mse_loss(reconstruction, images) + sum(quantized.losses.values())
                loss.backward()
                optimizer_step(optimizer, rate, max_grad_norm=1.0)
                model.quantizer.end_step()
                done += len(images)
            epoch += 1


@torch.inference_mode()
def evaluate(model: VQVAE, dataset: ImageDataset, rows: Tensor) -> dict[str, float]:
    """MSE on [0, 1] of the given rows, health of the codebook, and bits that an image takes."""
    error, counts = 0.0, torch.zeros(model.config.num_codes)
    for images in dataset.batches(rows.split(256), torch.device("cpu")):
        indices = model.encode(images)
        error += float(metrics.squared_error(images, model.decode(indices)).sum())
        counts += model.quantizer.count(indices)
    config = model.config
    tokens = math.prod(config.latent_dim) * config.depth
    return {
        "MSE": error / len(rows),
        **metrics.codebook_metrics(counts),
        "bits": tokens * math.log2(config.codebook_size),
    }


def main(flags: argparse.Namespace) -> None:
    dataset = ImageDataset(flags.path_to_data)
    train_rows, val_rows = split_rows(dataset.rows, val_fraction=0.1, seed=SEED)
    print(f"{dataset}\n{torch.get_num_threads()} threads, {flags.seconds} s of training for each\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    results = {}
    for name in flags.quantizers:
        torch.manual_seed(SEED)
        config = VQVAEConfig.create(
            **CASES[name],
            image_size=dataset.size,
            in_channels=dataset.channels,
            patch_size=flags.patch_size,
        )
        model = VQVAE(config).to(memory_format=torch.channels_last)
        speed = train(model, dataset, train_rows, flags)
        values = evaluate(model.eval(), dataset, val_rows)
        results[name] = {**values, "images_per_second": speed}
        print(
            f"| {name} | {values['MSE']:.5f} | {values['codebook_usage']:.0f} | "
            f"{values['perplexity']:.0f} | {values['bits']:.0f} | {speed:,.0f} |",
            flush=True,
        )
    print(f"\nwritten: {record.merge('quantizers', results)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--path_to_data", required=True, metavar="CSV", help="CSV of images")
    parser.add_argument("--seconds", type=cli.positive, default=180, help="of training, each")
    parser.add_argument(
        "--quantizers", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="X"
    )
    parser.add_argument("--patch_size", type=cli.positive, default=4)
    parser.add_argument("--batch_size", type=cli.positive, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
