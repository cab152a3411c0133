"""Learning curves beside peers: the same data, shapes and optimiser, the loss after equal steps.

`--part gpt`: our GPT beside a GPT-2 and a Llama of `transformers`, on codebook indices.
`--part tokenizer`: our tokenizer beside diffusers' VQModel, and our quantizers beside those of
`vector-quantize-pytorch` inside our encoder and decoder, on images.

Every model trains with each learning rate and each seed; its row in the table is that of its best
learning rate, chosen by the mean over the seeds. Batches and their order are the same for all.

The data and every finished training stay in `--work_dir`: the same command goes on after a stop,
and a further learning rate or seed adds to the table.
"""

import argparse
import json
import math
import multiprocessing
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import record
from benchmarks.gpt import make_gpt2, make_llama
from transformer import GPT, GPTConfig
from utils import cli
from utils.data.images import ImageDataset
from vqvae import VQVAE, VQVAEConfig

Curve = dict[str, list[float]]  # of each metric at each evaluation

HEADS = 4
CODEBOOK_SIZE, CODEBOOK_DIM = 512, 8
VALIDATION = 2000  # images, the last in a random order


class Job(NamedTuple):
    """One training."""

    part: str
    model: str
    learning_rate: float
    seed: int


GPTS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "ours": GPT,
    "GPT-2 (transformers)": make_gpt2,
    "Llama (transformers)": make_llama,
}


def token_loss(model: nn.Module, classes: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy of all indices (B, h, w) in nats; peers read the class as a token."""
    if isinstance(model, GPT):
        return model.loss(classes, indices).mean()
    tokens = torch.cat([classes[:, None] + CODEBOOK_SIZE, indices.flatten(1)], dim=1)
    logits = model(tokens[:, :-1]).logits[..., :CODEBOOK_SIZE]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Ours(nn.Module):
    """Our network with our quantizer, or with one of `vector-quantize-pytorch` in its place."""

    def __init__(self, config: VQVAEConfig, peer: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.peer = VQVAE(config), peer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> reconstruction, indices (B, h, w), loss of the quantizer."""
        if self.peer is None:
            reconstruction, quantized = self.model(images)
            losses = sum(quantized.losses.values(), images.new_zeros(()))
            return reconstruction, quantized.indices, losses
        vectors = self.model.encoder(images).permute(0, 2, 3, 1)
        z_q, indices, *loss = self.peer(vectors.flatten(1, 2))
        made = self.model.decoder(z_q.view(vectors.shape).permute(0, 3, 1, 2))
        return made, indices.view(vectors.shape[:3]), sum(loss, images.new_zeros(()))


class Diffusers(nn.Module):
    """`VQModel` of diffusers with three levels, so that it downsamples by 4 as ours does."""

    def __init__(self, image_size: tuple[int, int], channels: int) -> None:
        from diffusers import VQModel

        super().__init__()
        self.model = VQModel(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 64),
            layers_per_block=1,
            latent_channels=CODEBOOK_DIM,
            sample_size=image_size[0],
            num_vq_embeddings=CODEBOOK_SIZE,
            vq_embed_dim=CODEBOOK_DIM,
            norm_num_groups=8,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> reconstruction, indices, loss of the quantizer."""
        z_e = self.model.quant_conv(self.model.encoder(images))
        z_q, loss, (_, _, indices) = self.model.quantize(z_e)
        made = self.model.decoder(self.model.post_quant_conv(z_q))
        return made, indices.view(z_e.shape[0], *z_e.shape[2:]), loss


def our_config(quantizer: str, image_size: tuple[int, int], channels: int) -> VQVAEConfig:
    shape = {"image_size": image_size, "in_channels": channels}
    return VQVAEConfig.create(quantizer=quantizer, codebook_size=CODEBOOK_SIZE, **shape)


def vector_quantize(image_size: tuple[int, int], channels: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    peer = VectorQuantize(
        CODEBOOK_DIM, CODEBOOK_SIZE, kmeans_init=True, threshold_ema_dead_code=2, decay=0.99
    )
    return Ours(our_config("vq", image_size, channels), peer)


def peer_fsq(image_size: tuple[int, int], channels: int) -> nn.Module:
    from vector_quantize_pytorch import FSQ

    config = our_config("fsq", image_size, channels)
    return Ours(config, FSQ(list(config.quantizer_options.levels)))


TOKENIZERS: dict[str, Callable[[tuple[int, int], int], nn.Module]] = {
    "ours, vq": lambda size, channels: Ours(our_config("vq", size, channels)),
    "ours, ema": lambda size, channels: Ours(our_config("ema", size, channels)),
    "ours, fsq": lambda size, channels: Ours(our_config("fsq", size, channels)),
    "our network, VectorQuantize (vector-quantize-pytorch)": vector_quantize,
    "our network, FSQ (vector-quantize-pytorch)": peer_fsq,
    "VQModel (diffusers)": Diffusers,
}


def make_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW that decays matrices and no vectors, the same for all."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    evaluate: Callable[[], dict[str, float]],
    optimizer: torch.optim.Optimizer,
    rows: int,
    flags: argparse.Namespace,
    seed: int,
) -> Curve:
    """Train for `--steps` with linear warm-up and a cosine to zero; metrics at each evaluation."""
    peak = optimizer.param_groups[0]["lr"]
    order = torch.Generator().manual_seed(seed)
    curve: Curve = {"step": []}
    for step in range(flags.steps):
        warmup = min(100, flags.steps // 10)
        done = (step - warmup) / (flags.steps - warmup)
        scale = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
        loss = loss_of(torch.randint(rows, (flags.batch_size,), generator=order))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if isinstance(model, Ours) and model.peer is None:
            model.model.quantizer.end_step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, flags.steps // 5) == 0:
            model.eval()
            with torch.inference_mode():
                values = evaluate()
            model.train()
            curve["step"].append(step + 1)
            for name, value in values.items():
                curve.setdefault(name, []).append(value)
            shown = " ".join(f"{name} {value:.5g}" for name, value in values.items())
            print(f"  step {step + 1:>6,}  {shown}", flush=True)
    return curve


def save(folder: Path, name: str, values: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    np.save(folder / "unfinished.npy", values)
    (folder / "unfinished.npy").replace(folder / f"{name}.npy")


def load(folder: Path, name: str, device: torch.device) -> Tensor:
    """One of the arrays that `save` wrote."""
    return torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)).to(device)


def train_gpt(job: Job, flags: argparse.Namespace) -> Curve:
    device = torch.device(flags.device)
    indices, classes = (load(flags.work_dir, x, device).long() for x in ("indices", "classes"))
    torch.manual_seed(job.seed)
    config = GPTConfig(
        CODEBOOK_SIZE,
        num_classes=int(classes.max()) + 1,
        latent_dim=(indices.shape[1], indices.shape[2]),
        num_layers=flags.layers,
        num_heads=HEADS,
        dim=flags.dim,
        dropout=0.0,
    )
    model = GPTS[job.model](config).to(device)
    train_rows = len(indices) - VALIDATION

    def loss_of(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        return token_loss(model, classes[rows], indices[rows])

    def evaluate() -> dict[str, float]:
        parts = torch.arange(train_rows, len(indices), device=device).split(500)
        losses = [token_loss(model, classes[x], indices[x]) for x in parts]
        return {"bits_per_token": float(torch.stack(losses).mean()) / math.log(2)}

    optimizer = make_optimizer(model, job.learning_rate, (0.9, 0.95), weight_decay=0.05)
    curve = train(model, loss_of, evaluate, optimizer, train_rows, flags, job.seed)
    return curve | {"parameters": [sum(p.numel() for p in model.parameters())]}


def to_batch(images: Tensor) -> Tensor:  # uint8 -> [-1, 1]
    return images.float() / 127.5 - 1


def train_tokenizer(job: Job, flags: argparse.Namespace, *, encode: bool = False) -> Curve:
    device = torch.device(flags.device)
    images = load(flags.work_dir, "images", device)
    torch.manual_seed(job.seed)
    model = TOKENIZERS[job.model](tuple(images.shape[2:]), images.shape[1])
    model = model.to(device, memory_format=torch.channels_last)
    train_rows = len(images) - VALIDATION

    def loss_of(rows: Tensor) -> Tensor:
        batch = to_batch(images[rows.to(device)])
        made, _, loss = model(batch)
        return F.mse_loss(made, batch) + loss

    def evaluate() -> dict[str, float]:
        error, used = 0.0, torch.zeros(CODEBOOK_SIZE, dtype=torch.bool, device=device)
        for part in images[train_rows:].split(500):
            made, indices, _ = model(to_batch(part))
            error += float(F.mse_loss(made.clamp(-1, 1), to_batch(part))) / 4 * len(part)
            used[indices.flatten().long()] = True
        return {"mse": error / VALIDATION, "codebook_usage": 100 * float(used.float().mean())}

    optimizer = make_optimizer(model, job.learning_rate, (0.9, 0.99), weight_decay=0.0)
    curve = train(model, loss_of, evaluate, optimizer, train_rows, flags, job.seed)
    if encode:
        with torch.inference_mode():
            grids = [model(to_batch(part))[1].cpu() for part in images.split(500)]
        save(flags.work_dir, "indices", torch.cat(grids).numpy().astype(np.uint16))
    return curve | {"parameters": [sum(p.numel() for p in model.parameters())]}


def prepare(path_to_data: str, folder: Path) -> None:
    """Write the images of a CSV and their classes as arrays, in a random order."""
    dataset = ImageDataset(path_to_data)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    names = sorted({row.label for row in dataset.rows})
    classes = np.array([names.index(row.label) for row in dataset.rows], dtype=np.int64)
    save(folder, "classes", classes[order.numpy()])
    batches = dataset.batches(order.split(500), torch.device("cpu"))
    images = torch.cat([((x + 1) * 127.5).round().byte() for x in batches])
    save(folder, "images", images.numpy())  # last: where it is, both are


PARTS: dict[str, tuple[Any, Any, str]] = {
    "gpt": (GPTS, train_gpt, "bits_per_token"),
    "tokenizer": (TOKENIZERS, train_tokenizer, "mse"),
}


def run(job: Job, flags: argparse.Namespace) -> Curve:
    """The curve of a training, read where a finished one with the same settings left it."""
    size = (flags.dim, flags.layers) if job.part == "gpt" else ()
    name = "-".join(str(x) for x in (*job, flags.steps, flags.batch_size, *size))
    file = flags.work_dir / f"{re.sub('[^a-zA-Z0-9.-]+', '_', name)}.json"
    if not file.exists():
        print(f"{job.part}: {job.model}, learning rate {job.learning_rate:g}, seed {job.seed}")
        if flags.device == "cpu" and flags.jobs > 1:
            torch.set_num_threads(1)
        curve = PARTS[job.part][1](job, flags)
        file.with_suffix(".tmp").write_text(json.dumps(curve))
        file.with_suffix(".tmp").replace(file)
    return json.loads(file.read_text())


def report(part: str, curves: dict[Job, Curve]) -> dict[str, Any]:
    """Print a row for each model at its best learning rate; the rows with their curves."""
    models, _, metric = PARTS[part]
    rows: dict[str, Any] = {}
    more = ["codebook_usage"] if part == "tokenizer" else []
    titles = "model", "parameters", "learning rate", f"{metric}, mean (range over seeds)"
    print(f"| {' | '.join((*titles, *more, 'curve'))} |")
    print("|---" * (len(titles) + len(more) + 1) + "|")
    for model in models:
        by_rate: dict[float, list[Curve]] = {}
        for job, curve in curves.items():
            if (job.part, job.model) == (part, model):
                by_rate.setdefault(job.learning_rate, []).append(curve)
        if not by_rate:
            continue
        # The mean over the seeds at each evaluation.
        means = {
            rate: [statistics.fmean(x) for x in zip(*(one[metric] for one in found), strict=True)]
            for rate, found in by_rate.items()
        }
        rate = min(means, key=lambda x: means[x][-1])
        ends, count = [one[metric][-1] for one in by_rate[rate]], by_rate[rate][0]["parameters"][0]
        scores = f"{means[rate][-1]:.5g} ({min(ends):.5g} to {max(ends):.5g})"
        shown = " ".join(f"{x:.4g}" for x in means[rate])
        last = [f"{statistics.fmean(x[name][-1] for x in by_rate[rate]):.3g}" for name in more]
        print(f"| {' | '.join((model, f'{count:,}', f'{rate:g}', scores, *last, shown))} |")
        rows[model] = {
            "best_learning_rate": rate,
            "parameters": count,
            "by_learning_rate": {f"{x:g}": found for x, found in by_rate.items()},
        }
    return rows


def main(flags: argparse.Namespace) -> None:
    """Train all models, and print and record the tables."""
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    if not (flags.work_dir / "images.npy").exists():
        prepare(flags.path_to_data, flags.work_dir)
    if "gpt" in flags.parts and not (flags.work_dir / "indices.npy").exists():
        train_tokenizer(Job("tokenizer", "ours, vq", 2e-3, 0), flags, encode=True)
    jobs = [
        Job(part, model, rate, seed)
        for part in flags.parts
        for seed in flags.seeds
        for rate in flags.learning_rates
        for model in PARTS[part][0]
        if not flags.models or model in flags.models
    ]
    with ProcessPoolExecutor(flags.jobs, multiprocessing.get_context("spawn")) as pool:
        running = {job: pool.submit(run, job, flags) for job in jobs}
        curves: dict[Job, Curve] = {job: future.result() for job, future in running.items()}
    rows: dict[str, Any] = {}
    for part in flags.parts:
        print()
        found = report(part, curves)
        rows |= {f"{flags.data}, {part}: {model}": row for model, row in found.items()}
    print(f"\nwritten: {record.merge('learning', rows)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.learning")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--models", nargs="+", help="only these (default: all)")
    parser.add_argument("--path_to_data", required=True, metavar="CSV", help="labelled images")
    parser.add_argument("--data", default="mnist", help="name of the data in the record")
    parser.add_argument("--steps", type=cli.positive, default=1000)
    parser.add_argument("--batch_size", type=cli.positive, default=64)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--dim", type=cli.positive, default=128, help="width of the GPTs")
    parser.add_argument("--layers", type=cli.positive, default=4, help="of the GPTs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=cli.positive, default=1, help="trainings at once")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/learning"))
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
