"""Each stage on a CPU beside a peer and beside the machine's limits, and what was aimed at.

Ways of doing the same alternate in rounds, so that other work slows all of them alike; a ratio is
one of medians. The results of two ways are compared first. Peers: VQModel of `diffusers`, GPT-2 and
Llama of `transformers`, VectorQuantize of `vector-quantize-pytorch`, ImageFolder of torchvision
with a DataLoader.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from utils import cli

cli.configure_process()  # as the scripts do, before PyTorch starts OpenMP

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import attention, gpt, record  # noqa: E402
from benchmarks.gpt import CODES, GRID, TOKENS, medians, train_step  # noqa: E402
from benchmarks.sources import to_pixels, write_images  # noqa: E402
from benchmarks.start import measure as measure_start  # noqa: E402
from quantize_dataset import quantize  # noqa: E402
from transformer.sampling import generate  # noqa: E402
from utils import distributed  # noqa: E402
from utils.data.images import ImageConfig, ImageDataset  # noqa: E402
from utils.evaluation.features import ImageSet, Settings  # noqa: E402
from utils.files import CACHE  # noqa: E402
from utils.training.config import TrainingConfig  # noqa: E402
from utils.training.loop import update_weights  # noqa: E402
from utils.training.optim import make_optimizer  # noqa: E402
from vqvae import VQVAE, VQVAEConfig  # noqa: E402
from vqvae.formats import import_weights  # noqa: E402
from vqvae.losses import LossConfig, ReconstructionLoss  # noqa: E402
from vqvae.quantizers.codebook import nearest_codes  # noqa: E402
from vqvae.train_step import forward_backward  # noqa: E402

LOOKUP = (32768, 16384, 8)  # vectors, codes, dimensions
LOOKUPS = "ours", "peer"


class Row(NamedTuple):
    """A line of the table."""

    what: str
    beside: str  # the peer or the limit
    ratio: float  # of the peer's seconds to ours, or the share of the limit that is reached
    aim: float

    def __str__(self) -> str:
        return f"| {self.what} | {self.beside} | {self.ratio:.2f} | {self.aim:g} |"


Rows = Iterator[Row]


def matrix_rate(flags: argparse.Namespace) -> float:
    """Operations/s of a matrix product in float32."""
    a, b = (torch.randn(flags.matrix, flags.matrix) for _ in range(2))
    return 2 * flags.matrix**3 / medians({"product": lambda: a @ b}, flags.rounds)["product"]


def start(flags: argparse.Namespace) -> Rows:
    """--help of the slowest script, beside `import torch` alone."""
    seconds = measure_start(flags.rounds)
    limit = seconds.pop("import torch")
    yield Row("`--help`", "`import torch`", limit / max(seconds.values()), 0.8)


def tokenizer(flags: argparse.Namespace) -> Rows:
    """A training step of two levels of 64 and 128 channels, in float32."""
    from diffusers import VQModel

    torch.manual_seed(0)
    peer = VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        latent_channels=64,
        num_vq_embeddings=CODES,
        vq_embed_dim=8,
        sample_size=flags.side,
    )
    model = import_weights("diffusers", peer.state_dict(), (flags.side, flags.side))[0]
    images = torch.rand(flags.images, 3, flags.side, flags.side) * 2 - 1
    with torch.inference_mode():  # the same indices, of the same codes
        _, _, (_, _, expected) = peer.quantize(peer.encode(images).latents)
        same = (model.encode(images).flatten() == expected.flatten()).float().mean()
    if same < 0.99:
        raise SystemExit(f"error: only {same:.1%} of the indices are those of the peer")
    model = model.to(memory_format=torch.channels_last)
    losses, config = ReconstructionLoss(LossConfig()), TrainingConfig()
    optimizer = make_optimizer(model, config, (0.9, 0.99))
    autocast = partial(distributed.autocast, torch.device("cpu"), "fp32")
    batch = images.contiguous(memory_format=torch.channels_last)

    def ours() -> None:
        forward_backward(model, batch, losses, autocast)
        update_weights(optimizer, 1e-4)

    peer_optimizer = torch.optim.AdamW(peer.train().parameters(), fused=True)

    def peer_loss() -> Tensor:
        z_q, loss, _ = peer.quantize(peer.encode(images).latents)
        return F.mse_loss(peer.decoder(peer.post_quant_conv(z_q)), images) + loss

    ways = {"ours": ours, "peer": partial(train_step, peer_optimizer, peer_loss, "fp32")}
    seconds = medians(ways, flags.rounds)
    with FlopCounterMode(display=False) as counter:
        ours()
    share = counter.get_total_flops() / seconds["ours"] / matrix_rate(flags)
    yield Row("tokenizer step", "VQModel (diffusers)", seconds["peer"] / seconds["ours"], 1.3)
    yield Row("the same, 64 channels", "matrix products", share, 0.6)


def transformer(flags: argparse.Namespace) -> Rows:
    """A training step in float32, 4 layers of 192; the limit, of 128."""
    options = argparse.Namespace(batch_size=flags.grids, rounds=flags.rounds, compile=False)
    found = gpt.training(argparse.Namespace(**vars(options), precisions=("fp32",)))["fp32"]
    for name, seconds in found.items():
        if name != "ours":
            yield Row(
                "GPT step", name.replace(" of transformers", ""), seconds / found["ours"], 1.3
            )
    found = gpt.limit(options)
    yield Row("GPT step", "its matrix products", found["products"] / found["step"], 0.65)


def sampling(flags: argparse.Namespace) -> Rows:
    """Grids of 7x7, 4 layers of 192, beside `generate` of GPT-2 and Llama with a static cache."""
    model, count = gpt.make_gpt().eval(), flags.grids
    prefix = torch.arange(count) % 10
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: generate(model, prefix, batch_size=count),
        "without a cache": lambda: gpt.sample_without_cache(model, prefix),
    }
    peers = {"GPT-2": gpt.make_gpt2(model.config), "Llama": gpt.make_llama(model.config)}
    for name, peer in peers.items():
        ways[f"generate ({name})"] = partial(generate_by_peer, peer.eval(), prefix)
    seconds = medians(ways, flags.rounds)
    for name, aim in (*((way, 3) for way in ways if "generate" in way), ("without a cache", 20)):
        yield Row(f"sampling {count} images", name, seconds[name] / seconds["ours"], aim)


@torch.inference_mode()
def generate_by_peer(peer: Any, prefix: Tensor) -> Tensor:
    """As many tokens by `generate` of `transformers`, with keys and values in a static cache."""
    options = {"cache_implementation": "static", "use_cache": True, "do_sample": True, "top_k": 0}
    options |= {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    tokens = peer.generate(CODES + prefix[:, None], **options)
    assert tokens.shape == (len(prefix), 1 + TOKENS)
    return tokens[:, 1:].view(-1, *GRID)


def lookup(flags: argparse.Namespace) -> Rows:
    """Seconds and memory of the lookup, each way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu", *sys.argv[1:], "--lookup"]
    found = {}
    for way in LOOKUPS:
        done = subprocess.run([*command, way], check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout)
    ours, peer = found.values()
    vectors, codes = torch.randn(512, LOOKUP[2]), torch.randn(512, LOOKUP[2])
    with torch.inference_mode():
        same = nearest_codes(vectors, codes) == peer_lookup(codes)(vectors)
    if same.float().mean() < 0.99:  # all but those at equal distance
        raise SystemExit("error: the two lookups find other codes")
    name = "VectorQuantize (vector-quantize-pytorch)"
    yield Row("codebook lookup", name, peer["seconds"] / ours["seconds"], 4)
    yield Row("its memory", name, peer["mib"] / ours["mib"], 10)


def measure_lookup(way: str, flags: argparse.Namespace) -> dict[str, float]:
    """Median seconds, and peak MiB beside vectors and codes."""
    torch.manual_seed(0)
    count, size, dim = LOOKUP
    vectors, codes = torch.randn(count, dim), torch.randn(size, dim)
    find = partial(nearest_codes, codebook=codes)
    if way == "peer":
        find = peer_lookup(codes)
    with torch.inference_mode():
        find(vectors[:64])
        before = attention.memory(torch.device("cpu"))
        seconds = medians({way: lambda: find(vectors)}, flags.rounds)[way]
        peak = attention.memory(torch.device("cpu"), peak=True) - before
        return {"seconds": seconds, "mib": peak / 2**20}


def peer_lookup(codes: Tensor) -> Callable[[Tensor], Tensor]:
    from vector_quantize_pytorch import VectorQuantize

    peer = VectorQuantize(codes.shape[1], len(codes)).eval()
    peer.codebook = codes
    return lambda vectors: peer(vectors[None])[1][0]


def loading(flags: argparse.Namespace) -> Rows:
    """JPEG files into batches: the first epoch with all that comes before it, and later ones."""
    from torchvision.datasets import ImageFolder

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as place, chdir(place):
        folder = Path(place) / "images"
        write_images(folder, flags.files, flags.file_side)
        kept: list[ImageDataset] = []

        def epoch(dataset: ImageDataset) -> None:
            order = torch.randperm(len(dataset)).split(flags.images)
            for _ in dataset.batches(order, torch.device("cpu")):
                pass

        def again() -> None:
            kept[:] = [ImageDataset(folder)]
            epoch(kept[0])

        def first() -> None:
            shutil.rmtree(CACHE, ignore_errors=True)
            again()

        def stock() -> None:
            files = ImageFolder(str(folder), to_pixels)
            for images, _ in DataLoader(files, flags.images, shuffle=True, num_workers=cores):
                images.float().div_(127.5).sub_(1)

        ways = {"first": first, "again": again, "next": lambda: epoch(kept[0]), "stock": stock}
        seconds = medians(ways, flags.rounds)
    name = "ImageFolder, DataLoader (torchvision)"
    yield Row("first epoch of images", name, seconds["stock"] / seconds["first"], 1.5)
    yield Row("first epoch of a second run", name, seconds["stock"] / seconds["again"], 1.5)
    yield Row("next epoch of images", name, seconds["stock"] / seconds["next"], 20)


def quantization(flags: argparse.Namespace) -> Rows:
    """Images of 256 pixels, beside decoding alone and encoding alone on the same cores."""
    torch.manual_seed(0)
    model: nn.Module = VQVAE(VQVAEConfig.create(image_size=(256, 256), in_channels=3)).eval()
    settings = Settings(torch.device("cpu"), 16, 0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        write_images(folder, flags.large, 256)
        streamed = ImageDataset(folder, ImageConfig(stream=True))
        in_memory = ImageDataset(folder)
        rows = torch.arange(len(streamed)).split(settings.batch_size)

        def decode() -> None:
            for _ in streamed.batches(rows, settings.device):
                pass

        ways = {
            "decoding": decode,
            "encoding": lambda: quantize(model, ImageSet.whole(in_memory), settings),
            "both": lambda: quantize(model, ImageSet.whole(streamed), settings),
        }
        if not torch.equal(ways["encoding"]()[0], ways["both"]()[0]):
            raise SystemExit("error: streamed images have other indices")
        seconds = medians(ways, flags.rounds)
    alone = seconds["decoding"] + seconds["encoding"]
    yield Row("quantization, 256 pixels", "decoding + encoding alone", alone / seconds["both"], 0.9)


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "start": start,
    "tokenizer": tokenizer,
    "transformer": transformer,
    "sampling": sampling,
    "lookup": lookup,
    "loading": loading,
    "quantization": quantization,
}


def main(flags: argparse.Namespace) -> None:
    if flags.lookup:
        print(json.dumps(measure_lookup(flags.lookup, flags)))
        return
    rows = []
    for part in flags.parts:
        for row in PARTS[part](flags):
            rows.append(row)
            print(f"{part}: {row}", flush=True)
            record.merge("cpu", {f"{row.what}, {row.beside}": {"ratio": row.ratio}})
    print(f"\n{torch.get_num_threads()} threads, medians of {flags.rounds} rounds\n")
    print("| | beside | times as fast, or share | aim |\n|---|---|---|---|")
    print(*rows, sep="\n")
    print(f"\nwritten: {record.RESULTS / 'cpu.json'}")


def make_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.cpu")
    add = partial(parser.add_argument, type=cli.positive)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    add("--rounds", default=5, help="of each way")
    add("--images", default=64, help="of a batch")
    add("--side", default=32, help="of the tokenizer's images, in pixels")
    add("--grids", default=256, help="of a batch of the GPT")
    add("--matrix", default=2048, help="side of the matrix product that is the limit")
    add("--files", default=4000, help="JPEG files to load")
    add("--file_side", default=128, help="their side in pixels")
    add("--large", default=256, help="JPEG files of 256 pixels to quantize")
    parser.add_argument("--lookup", choices=LOOKUPS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
