"""All GPU tables within ten minutes: each stage beside a peer and beside the machine's limits.

Each part runs in a process of its own for at most `--part_seconds`, and every row is written to
benchmarks/results/gpu.json as soon as it is measured. The limits are measured as well: a copy on
the device, and a matrix product in bfloat16. With --tiny all parts run in seconds, also on a CPU.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention, record, tokenizer
from benchmarks.gpt import make_gpt2, make_llama, peer_loss, train_step
from transformer import GPT, GPTConfig, SamplingParams
from transformer.sampling import generate
from utils import cli
from utils.plan import flops_per_token
from vqvae.quantizers.codebook import nearest_codes

CLASSES = 1000
# LlamaGen-L in vLLM on an A100 (arXiv 2406.06525): ms for a token of 16 sequences, which are 8
# images with guidance; and the bandwidth of that GPU, bytes/s (data sheet).
VLLM_MS, A100_BANDWIDTH = 6.0, 2.04e12
H100_BANDWIDTH = 3.35e12  # data sheet too, as the ratio of both scales vLLM's time

Row = dict[str, float]
Rows = Iterator[tuple[str, Row]]


def seconds_of(way: Callable[[], object], flags: argparse.Namespace) -> float:
    """Median seconds of a call, after some that warm up."""

    def finish() -> None:
        if flags.device == "cuda":
            torch.cuda.synchronize()

    found = []
    for number in range(flags.warm_up + flags.rounds):
        finish()
        start = time.perf_counter()
        way()
        finish()
        if number >= flags.warm_up:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def peak_bytes(way: Callable[[], object], flags: argparse.Namespace) -> Row:
    """Bytes that a call allocates at most, beyond what there was; nothing on a CPU."""
    if flags.device != "cuda":
        return {}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


def measure_limits(flags: argparse.Namespace) -> tuple[float, float]:
    """Bytes/s of a copy, read and written, and operations/s of a matrix product in bfloat16."""
    size = 64 if flags.tiny else 8192
    source = torch.randn(size * size * 4, device=flags.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), flags)
    a, b = (torch.randn(size, size, device=flags.device, dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * size**3 / seconds_of(lambda: a @ b, flags)


def limits(flags: argparse.Namespace) -> Rows:
    copy, product = measure_limits(flags)
    yield "copy and matrix product", {"gb_per_second": copy / 1e9, "tflops": product / 1e12}


def materialised_lookup(vectors: Tensor, codebook: Tensor) -> Tensor:
    """All distances in memory, as taming-transformers' VectorQuantizer2 computes them."""
    distances = vectors.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    return (distances - 2 * (vectors @ codebook.T)).argmin(dim=1)


def lookup(flags: argparse.Namespace) -> Rows:
    """Codebook lookup of the tokens of 128 images of 256 pixels, by the size of the codes."""
    torch.set_float32_matmul_precision("highest")
    count, size = (512, 256) if flags.tiny else (32768, 16384)
    for dim in (8, 256):
        vectors, codebook = (torch.randn(n, dim, device=flags.device) for n in (count, size))
        ways = {
            "materialised": partial(materialised_lookup, vectors, codebook),
            "ours": partial(nearest_codes, vectors, codebook),
        }
        same = float((ways["ours"]() == ways["materialised"]()).double().mean())
        found = {name: seconds_of(way, flags) for name, way in ways.items()}
        for name, way in ways.items():
            yield (
                f"{count} vectors, {size} codes of {dim}, {name}",
                {
                    "ms": 1000 * found[name],
                    "tflops": 2 * count * size * dim / found[name] / 1e12,
                    "times_faster": found["materialised"] / found[name],
                    "same_codes": same,
                    **peak_bytes(way, flags),
                },
            )


def make_config(flags: argparse.Namespace, side: int) -> GPTConfig:
    return GPTConfig(
        codebook_size=64 if flags.tiny else 16384,
        num_classes=CLASSES,
        latent_dim=(side, side),
        size=flags.size,
        dropout=0.0,
    )


def sampling(flags: argparse.Namespace) -> Rows:
    """ms of a step in bf16, and how near that comes to the time in which memory is read once.

    What a step must read: all weights but the embeddings, and earlier keys and values.
    All that `generate` does counts: the step and its sample, which are one graph if compiled.
    """
    bandwidth, _ = measure_limits(flags)
    cases = ((16, 256, 2.0), (24, 8, 2.0), (16, 1, 1.0))
    for side, count, scale in ((1, 1, 1.0), (2, 8, 2.0)) if flags.tiny else cases:
        model = GPT(make_config(flags, side)).to(flags.device).to(torch.bfloat16).eval()
        prefix = torch.arange(count) % CLASSES
        options: dict[str, Any] = {"params": SamplingParams(guidance_scale=scale)}
        options |= {"batch_size": count, "compiled": flags.compile}
        short = argparse.Namespace(**{**vars(flags), "warm_up": 1, "rounds": 3})
        step = seconds_of(partial(generate, model, prefix, **options), short) / side**2
        matrices = sum(p.nbytes for p in (*model.blocks.parameters(), model.head.weight))
        rows = count if scale == 1 else 2 * count
        limit = (matrices + model.make_cache(rows).nbytes / 2) / bandwidth
        found = {
            "ms_a_step": 1000 * step,
            "tokens_per_second": count / step,
            "images_per_second": count / step / side**2,
            "share_of_bandwidth": limit / step,
        }
        if count == 8:
            scaled = VLLM_MS * A100_BANDWIDTH / H100_BANDWIDTH
            found["times_faster_than_scaled_vllm"] = scaled / (1000 * step)
        yield f"{count} images of {side}x{side} tokens, guidance {scale:g}", found


def training(flags: argparse.Namespace) -> Rows:
    """tokens/s in bf16, and the share of the measured matrix product: ours, GPT-2, Llama."""
    _, peak = measure_limits(flags)
    side, count = (2, 2) if flags.tiny else (16, 64)
    config = make_config(flags, side)
    prefix = torch.randint(CLASSES, (count,), device=flags.device)
    indices = torch.randint(config.codebook_size, (count, side, side), device=flags.device)
    tokens = torch.cat([prefix[:, None] + config.codebook_size, indices.flatten(1)], dim=1)

    def ours() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
        model = GPT(config).to(flags.device)
        loss = torch.compile(model.loss) if flags.compile else model.loss
        return model, lambda: loss(prefix, indices).mean()

    def peer(make: Callable[[GPTConfig], torch.nn.Module]) -> Any:
        model = make(config).to(flags.device)
        if flags.compile:
            model.compile()
        return model, lambda: peer_loss(model, tokens)

    ways = {"ours": ours, "Llama": partial(peer, make_llama), "GPT-2": partial(peer, make_gpt2)}
    for name, make in ways.items():
        model, loss = make()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = partial(train_step, optimizer, loss, "bf16")
        speed = count * side * side / seconds_of(step, flags)
        yield (
            name,
            {
                "tokens_per_second": speed,
                "share_of_product": speed * flops_per_token(config) / peak,
                **peak_bytes(step, flags),
            },
        )
        del model, loss, optimizer, step


def tokenizer_training(flags: argparse.Namespace) -> Rows:
    """Images/s of vqgan-f16 in bf16, alone and with its discriminator, and share of the limit."""
    _, peak = measure_limits(flags)
    options = tokenizer.make_parser().parse_args([])
    options.compile, options.precision = flags.compile, "bf16"
    if flags.tiny:
        options.preset, options.image_size, options.batch_size = "vqvae-small", 16, 2
        options.disc_layers = 2
        options.warmup = options.steps = 1
    for name in ("tokenizer", "with PatchGAN"):
        device = torch.device(flags.device)
        flops = tokenizer.count(tokenizer.WAYS[name], options, device)
        found = tokenizer.measure(tokenizer.WAYS[name], options, device)
        share = found["images_per_second"] * flops / peak
        yield name, {**found, "gigaflops_an_image": flops / 1e9, "share_of_product": share}


def windows(flags: argparse.Namespace) -> Rows:
    """Windowed attention, forward and backward in fp32, beside full causal attention."""
    options = SimpleNamespace(device=flags.device, heads=16, window=8, repeats=flags.rounds)
    for side in (16,) if flags.tiny else (32, 64, 128):
        for way in ("full causal", "window", *(("flex",) if flags.device == "cuda" else ())):
            found = attention.measure(way, side, options)
            yield f"{side}x{side}, {way}", {"ms": 1000 * found["seconds"], "mib": found["mib"]}


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "limits": limits,
    "lookup": lookup,
    "windows": windows,
    "tokenizer": tokenizer_training,
    "sampling": sampling,
    "training": training,
}


def run_part(part: str, flags: argparse.Namespace) -> None:
    """Measure a part here; write each of its rows at once."""
    torch.set_float32_matmul_precision("high")
    for name, values in PARTS[part](flags):
        figures = ", ".join(f"{key} {value:,.4g}" for key, value in values.items())
        print(f"{part}: {name}: {figures}", flush=True)
        record.merge("gpu", {f"{part}: {name}": dict(values)})


def main(flags: argparse.Namespace) -> None:
    if flags.part:
        run_part(flags.part, flags)
        return
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--part"]
    for part in flags.parts:
        try:
            subprocess.run([*command, part], check=True, timeout=flags.part_seconds)
        except subprocess.TimeoutExpired:
            print(f"{part}: ended after {flags.part_seconds} s", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"{part}: failed with exit code {error.returncode}", flush=True)
    print(f"\nwritten: {record.RESULTS / 'gpu.json'}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.gpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", default="L", help="of the GPT (default: L)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--part_seconds", type=cli.positive, default=150, help="at most, a part")
    parser.add_argument("--warm_up", type=cli.positive, default=3, help="calls that do not count")
    parser.add_argument("--rounds", type=cli.positive, default=10, help="calls that are timed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
