"""Training a tokenizer against the machine's limit: with PatchGAN, and with LPIPS beside it.

The limit is what the matrix units could do if they did nothing else: --peak_tflops over the
operations of a step, which are counted. LPIPS looks through a network with random weights, which
takes the same time as a trained one.
"""

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from utils import cli, distributed
from utils.training.config import TrainingConfig
from utils.training.loop import clip_gradients, update_weights
from utils.training.optim import make_optimizer
from vqvae import PRESETS, VQVAE, VQVAEConfig
from vqvae.adversarial import AdversarialConfig, AdversarialLoss
from vqvae.losses import LossConfig, PerceptualLoss, ReconstructionLoss
from vqvae.train_step import compile_model, forward_backward

WAYS = {  # weights of the terms beside L1 and L2; LPIPS is built here, with random weights
    "tokenizer": {},
    "with PatchGAN": {"disc_weight": 0.8},
    "with PatchGAN and LPIPS": {"disc_weight": 0.8, "perceptual_weight": 1.0},
}


def make_step(
    settings: dict[str, float], flags: argparse.Namespace, device: torch.device
) -> Callable[[torch.Tensor], None]:
    """One training step as train_vqvae.py makes it, past the ramp of the adversarial loss."""
    torch.manual_seed(0)
    size = (flags.image_size, flags.image_size)
    config = VQVAEConfig.from_preset(flags.preset, image_size=size, in_channels=3)
    model = VQVAE(config).to(device, memory_format=torch.channels_last)
    losses = ReconstructionLoss(LossConfig(l1_weight=1.0))
    if "perceptual_weight" in settings:
        losses.config = LossConfig(1.0, perceptual_weight=settings["perceptual_weight"])
        losses.perceptual = PerceptualLoss("vgg", pretrained=False)
    losses.to(device)
    rates = TrainingConfig()
    optimizer = make_optimizer(model, rates, betas=(0.9, 0.99))
    acting, adversary = {}, None
    if "disc_weight" in settings:
        config = AdversarialConfig(
            disc_weight=settings["disc_weight"],
            disc_layers=flags.disc_layers,
            disc_start=0.0,
            disc_adaptive_schedule=False,
        )
        adversary = AdversarialLoss(config, 3, size, total_steps=1).to(device)
        adversary.to(memory_format=torch.channels_last)
        against = make_optimizer(adversary, rates, betas=(0.5, 0.9))
        acting = {"adversary": adversary}
    if flags.compile:
        compile_model(model)
    autocast = partial(distributed.autocast, device, flags.precision)

    def step(images: torch.Tensor) -> None:
        forward_backward(model, images, losses, autocast, **acting)
        clip_gradients(optimizer, 1.0)
        update_weights(optimizer, 1e-4)
        if acting:
            clip_gradients(against, 1.0)
            update_weights(against, 1e-4)

    return step


def count(settings: dict[str, float], flags: argparse.Namespace, device: torch.device) -> float:
    """Operations of a step for one image, uncompiled; two images, as BatchNorm is about several."""
    eager = argparse.Namespace(**{**vars(flags), "compile": False})
    step = make_step(settings, eager, device)
    images = torch.rand(2, 3, flags.image_size, flags.image_size, device=device) * 2 - 1
    step(images)  # the codes start from the first batch, which is no part of a step
    with FlopCounterMode(display=False) as counter:
        step(images)
    return counter.get_total_flops() / len(images)


def measure(
    settings: dict[str, float], flags: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Images/s of a step, and peak memory in GiB where the device tells."""
    step = make_step(settings, flags, device)
    images = torch.rand(flags.batch_size, 3, flags.image_size, flags.image_size, device=device)
    images = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
    for _ in range(flags.warmup):
        step(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(flags.steps):
        step(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = {"images_per_second": flags.steps * len(images) / (time.perf_counter() - start)}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main(flags: argparse.Namespace) -> None:
    device = distributed.pick_device(flags.device)
    flags.precision = distributed.pick_precision(flags.precision, device, on_cpu="fp32")
    print(
        f"{flags.preset}, {flags.image_size} pixels a side, batches of {flags.batch_size}, "
        f"{flags.precision}, {'compiled' if flags.compile else 'not compiled'}, on {device}; "
        f"limit: {flags.peak_tflops:g} TFLOP/s\n\n"
        "| | images/s | peak GiB | GFLOP an image | limit, images/s | of the limit |\n"
        "|---|---|---|---|---|---|"
    )
    results = {}
    for name, settings in WAYS.items():
        flops = count(settings, flags, device)
        gc.collect()
        found = measure(settings, flags, device)
        gc.collect()
        limit = flags.peak_tflops * 1e12 / flops
        share = found["images_per_second"] / limit
        results[name] = {**found, "gigaflops": flops / 1e9, "limit": limit, "share": share}
        peak = f"{found['peak_gib']:.1f}" if "peak_gib" in found else "-"
        print(
            f"| {name} | {found['images_per_second']:,.1f} | {peak} | {flops / 1e9:,.0f} | "
            f"{limit:,.0f} | {share:.1%} |",
            flush=True,
        )
    print(f"\nwritten: {record.write('tokenizer', {**vars(flags), 'ways': results})}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="vqgan-f16")
    parser.add_argument("--image_size", type=cli.positive, default=256, help="side in pixels")
    parser.add_argument("--batch_size", type=cli.positive, default=32)
    parser.add_argument("--disc_layers", type=cli.positive, default=3)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--warmup", type=cli.positive, default=5, help="steps that do not count")
    parser.add_argument("--steps", type=cli.positive, default=20, help="that are timed")
    parser.add_argument(
        "--peak_tflops", type=float, default=790.0, help="measured bf16 peak (default: an H100's)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
