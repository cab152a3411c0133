"""What the presets cost: parameters, tokens, operations and time to encode and decode an image."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from utils import cli, distributed
from vqvae import PRESETS, VQVAE, VQVAEConfig

COLUMNS = (
    "",
    "M parameters",
    "tokens",
    "GFLOP to encode",
    "to decode",
    "ms to encode",
    "to decode",
)


def operations(config: VQVAEConfig) -> dict[str, float]:
    """GFLOP to encode and to decode one image, a multiplication and an addition counting as two."""
    with torch.device("meta"):  # shapes are enough
        model = VQVAE(config).eval()
        image = torch.empty(1, config.in_channels, *config.image_size)
        z_q = torch.empty(1, config.codebook_dim, *config.latent_dim)
    found = {}
    for name, part, x in (("encode", model.encoder, image), ("decode", model.decoder, z_q)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(x)
        found[name] = counter.get_total_flops() / 1e9
    codes = config.codebook_size * config.codebook_dim * config.depth
    found["encode"] += 2 * codes * config.latent_dim[0] * config.latent_dim[1] / 1e9  # the search
    return found


@torch.inference_mode()
def milliseconds(config: VQVAEConfig, device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds to encode and to decode one image; the first round only warms up."""
    if rounds == 0:
        return {}
    torch.manual_seed(0)
    model = VQVAE(config).eval().to(device, memory_format=torch.channels_last)
    image = torch.rand(1, config.in_channels, *config.image_size, device=device) * 2 - 1
    indices = model.encode(image)
    return {
        "encode": median(lambda: model.encode(image), device, rounds),
        "decode": median(lambda: model.decode(indices), device, rounds),
    }


def median(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main(flags: argparse.Namespace) -> None:
    device = distributed.pick_device(flags.device)
    print(
        f"one image of {flags.image_size} pixels a side, 3 channels, fp32; medians of "
        f"{flags.rounds} on {device}, {torch.get_num_threads()} threads\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    )
    results = {}
    for name in PRESETS:
        config = VQVAEConfig.from_preset(name, image_size=(flags.image_size,) * 2, in_channels=3)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in VQVAE(config).parameters())
        tokens = config.latent_dim[0] * config.latent_dim[1] * config.depth
        flops, times = operations(config), milliseconds(config, device, flags.rounds)
        results[name] = {
            "parameters": parameters,
            "tokens": tokens,
            "gigaflops": flops,
            "milliseconds": times,
        }
        shown = [f"{times[way]:,.0f}" if times else "-" for way in ("encode", "decode")]
        print(
            f"| {name} | {parameters / 1e6:.2f} | {tokens:,} | {flops['encode']:.1f} | "
            f"{flops['decode']:.1f} | {shown[0]} | {shown[1]} |",
            flush=True,
        )
    print(f"\nwritten: {record.write('presets', results)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--image_size", type=cli.positive, default=256, help="side in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="of each timing; 0: no timing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
