"""All quantizers beside each other: the same network, data, steps and bits per image for each."""

import argparse
import json
import math
import time
from pathlib import Path

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
from utils.training.loop import clip_gradients, update_weights
from utils.training.optim import make_optimizer
from vqvae import QUANTIZERS, VQVAE, VQVAEConfig

SPLIT_SEED = 0
# Half the width of vqvae-small, so that a table takes minutes; `--set` overrides it.
NETWORK: dict[str, object] = {"channels": 32, "channels_per_group": 8}
# Settings by name. All have 9 bits per latent position: 512 codes, or 3 of 8.
CASES: dict[str, dict[str, object]] = {name: {"quantizer": name} for name in QUANTIZERS}
CASES["residual"] |= {"codebook_size": 8, "depth": 3}
COLUMNS = ("quantizer", "MSE", "relative", "usage %", "perplexity", "bits an image", "images/s")


def train(
    model: VQVAE, dataset: ImageDataset, rows: Tensor, seed: int, flags: argparse.Namespace
) -> float:
    """Train for `--steps`; the learning rate follows a cosine. Returns images/s."""
    optimizer = make_optimizer(
        model, TrainingConfig(learning_rate=flags.learning_rate), betas=(0.9, 0.99)
    )
    per_epoch = len(rows) // flags.batch_size
    batches: list[Tensor] = []
    for epoch in range(math.ceil(flags.steps / per_epoch)):
        batches += epoch_order(rows, seed, epoch).split(flags.batch_size)[:per_epoch]
    start = time.perf_counter()
    images_of_steps = dataset.batches(batches[: flags.steps], torch.device("cpu"))
    bar = tqdm(images_of_steps, total=flags.steps, desc=model.config.quantizer, disable=None)
    for step, images in enumerate(bar):
        warm_up = min(1.0, (step + 1) / 100)
        rate = flags.learning_rate * warm_up * (1 + math.cos(math.pi * step / flags.steps)) / 2
        reconstruction, quantized = model(images)
        loss = F.mse_loss(reconstruction, images) + sum(quantized.losses.values())
        loss.backward()
        clip_gradients(optimizer, 1.0)
        update_weights(optimizer, rate)
        model.quantizer.end_step()
    return flags.steps * flags.batch_size / (time.perf_counter() - start)


@torch.inference_mode()
def evaluate(model: VQVAE, dataset: ImageDataset, rows: Tensor) -> dict[str, float]:
    """MSE on [0, 1] of the given rows, health of the codebook, and bits that an image takes."""
    error, counts = 0.0, torch.zeros(model.quantizer.options.num_codes)
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


def measure(
    settings: dict[str, object], dataset: ImageDataset, flags: argparse.Namespace
) -> dict[str, float]:
    """Train and evaluate one case with each seed: means over the seeds, and the MSE of each."""
    train_rows, val_rows = split_rows(dataset.rows, val_fraction=0.1, seed=SPLIT_SEED)
    found = []
    for seed in flags.seeds:
        torch.manual_seed(seed)
        size = {"image_size": dataset.size, "in_channels": dataset.channels}
        config = VQVAEConfig.create(**NETWORK | size | settings)
        model = VQVAE(config).to(memory_format=torch.channels_last)
        speed = train(model, dataset, train_rows, seed, flags)
        values = evaluate(model.eval(), dataset, val_rows[: flags.max_val_images])
        found.append(values | {"images_per_second": speed, f"MSE_{seed}": values["MSE"]})
    means = {key: sum(values[key] for values in found) / len(found) for key in found[0]}
    return means | {key: x for values in found for key, x in values.items() if "MSE_" in key}


def main(flags: argparse.Namespace) -> None:
    dataset = ImageDataset(flags.path_to_data)
    given = {name: json.loads(x) for name, _, x in (text.partition("=") for text in flags.set)}
    print(f"{dataset}\n{torch.get_num_threads()} threads, {flags.steps} steps for each\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    data = Path(flags.path_to_data).parent.name
    results = {}
    for name in flags.quantizers:
        values = measure(CASES[name] | given, dataset, flags)
        results[" ".join([f"{data}: {name}", *flags.set])] = values
        best = min(found["MSE"] for found in results.values())
        print(
            f"| {name} | {values['MSE']:.5f} | {values['MSE'] / best:.2f} | "
            f"{values['codebook_usage']:.0f} | {values['perplexity']:.0f} | {values['bits']:.0f} | "
            f"{values['images_per_second']:,.0f} |",
            flush=True,
        )
    print(f"\nwritten: {record.merge('quantizers', results)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--path_to_data", required=True, metavar="CSV", help="CSV of images")
    add("--steps", type=cli.positive, default=300, help="of training, each")
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--quantizers", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="X")
    setting = "setting of all tokenizers, as channels=64; repeatable"
    add("--set", action="append", default=[], metavar="NAME=JSON", help=setting)
    add("--batch_size", type=cli.positive, default=32)
    add("--learning_rate", type=float, default=2e-3)
    add("--max_val_images", type=cli.positive, default=1000)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
