"""Each data source beside a stock reader of its format: images a second, in interleaved rounds.

Both decode with Pillow in this process and give batches in [-1, 1]. The stock readers are
torchvision's ImageFolder in a DataLoader, pyarrow row by row, and tarfile (WebDataset's way) in
the order of the file. Ours read in the order of the file, and in the random order of a training.

The tar file comes from a web server of this machine as well: the stock reader streams it, ours
copies it first (cold), or finds the copy of an earlier run unchanged (warm).
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import record
from benchmarks.gpt import medians
from utils import addresses, cli
from utils.data.images import ImageConfig, ImageDataset
from utils.data.sources import epoch_order

CLASSES = 10
GROUP = 100  # rows of a row group, as Hugging Face datasets writes them


def write_images(folder: Path, count: int, side: int) -> list[Path]:
    """JPEG files of smooth noise in folders of classes."""
    generator = np.random.default_rng(0)
    files = []
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        files.append(folder / str(number % CLASSES) / f"{number:06}.jpg")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        small.resize((side, side), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def write_formats(folder: Path, files: list[Path]) -> dict[str, Path]:
    """The same images in each format."""
    import pyarrow as pa
    from pyarrow import parquet

    with (folder / "data.csv").open("w") as table:
        table.write("image_path,label\n")
        table.writelines(f"{file.relative_to(folder)},{file.parent.name}\n" for file in files)
    column = pa.array([{"bytes": file.read_bytes(), "path": file.name} for file in files])
    data = pa.table({"image": column, "label": [int(file.parent.name) for file in files]})
    parquet.write_table(data, folder / "data.parquet", row_group_size=GROUP)
    with (
        pa.OSFile(str(folder / "data.arrow"), "wb") as stream,
        pa.ipc.new_stream(stream, data.schema) as writer,
    ):
        writer.write_table(data, max_chunksize=GROUP)
    with tarfile.open(folder / "data.tar", "w") as archive:
        for file in files:
            archive.add(file, file.name)
            label = tarfile.TarInfo(f"{file.stem}.cls")
            content = file.parent.name.encode()
            label.size = len(content)
            archive.addfile(label, io.BytesIO(content))
    names = ("data.csv", "data.parquet", "data.arrow", "data.tar")
    return {"folder": folder / "images", **{name[5:]: folder / name for name in names}}


def to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def read_batches(images: Iterator[Image.Image], size: int) -> None:
    """Stack and scale the images, as `ImageDataset.batches` does."""
    batch: list[Tensor] = []
    for image in images:
        batch.append(to_pixels(image))
        if len(batch) == size:
            torch.stack(batch).float().div_(127.5).sub_(1)
            batch = []
    if batch:
        torch.stack(batch).float().div_(127.5).sub_(1)


def stock_folder(path: Path, size: int) -> None:
    from torchvision.datasets import ImageFolder

    for images, _ in DataLoader(ImageFolder(str(path), to_pixels), size, shuffle=True):
        images.float().div_(127.5).sub_(1)


def stock_table(path: Path, size: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def rows() -> Iterator[Image.Image]:
        if path.suffix == ".parquet":
            pieces = parquet.ParquetFile(path).iter_batches(batch_size=GROUP)
        else:
            pieces = pa.ipc.open_stream(pa.memory_map(str(path)))
        for piece in pieces:
            for row in piece.to_pylist():
                yield Image.open(io.BytesIO(row["image"]["bytes"]))

    read_batches(rows(), size)


def stock_tar(path: Path | str, size: int) -> None:
    import fsspec

    def members() -> Iterator[Image.Image]:
        # A stream: the server of Python has no ranges.
        options = {"block_size": 0} if addresses.is_url(path) else {}
        with (
            fsspec.open(str(path), **options) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                content = archive.extractfile(member)
                if content is not None and member.name.endswith(".jpg"):
                    yield Image.open(io.BytesIO(content.read()))

    read_batches(members(), size)


def read(dataset: ImageDataset, order: Tensor, size: int) -> None:
    for _ in dataset.batches(order.split(size), torch.device("cpu")):
        pass


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """The address of a folder in a web server of this machine."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process.stdout.readline().split("(")[1].split("/)")[0]
        finally:
            process.kill()


def read_remote(url: str, size: int, *, cold: bool) -> None:
    """Read a tar file at a URL as a training does at its start."""
    addresses.download.cache_clear()
    addresses.Mirror.cache_clear()
    if cold:
        shutil.rmtree(addresses.REMOTE, ignore_errors=True)
    config = ImageConfig(stream=True, num_workers=0)
    dataset = ImageDataset(url, config, value_range=(0, 255))
    read(dataset, torch.arange(len(dataset)), size)


STOCK = {"folder": stock_folder, "csv": stock_folder, "tar": stock_tar}
STOCK |= {"parquet": stock_table, "arrow": stock_table}


def main(flags: argparse.Namespace) -> None:
    results = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write_images(folder / "images", flags.count, flags.side)
        print(
            f"images/s of {flags.count:,} JPEG files of {flags.side} pixels, {flags.rounds} rounds"
        )
        print("\n| | stock | in order | random order | ratio | random |\n|---|---|---|---|---|---|")
        for name, path in write_formats(folder, files).items():
            config = ImageConfig(stream=True, num_workers=0)
            dataset = ImageDataset(path, config, value_range=(0, 255))
            rows = torch.arange(len(dataset))
            ways = {
                "in order": partial(read, dataset, rows, flags.batch_size),
                "random": partial(read, dataset, epoch_order(rows, 0, 0), flags.batch_size),
            }
            images = folder / "images" if name == "csv" else path
            ways["stock"] = partial(STOCK[name], images, flags.batch_size)
            found = medians(ways, flags.rounds)
            speeds = {way: flags.count / seconds for way, seconds in found.items()}
            ratios = [speeds[way] / speeds["stock"] for way in ("in order", "random")]
            columns = [f"{speeds[way]:,.0f}" for way in ("stock", "in order", "random")]
            columns += [f"{ratio:.2f}" for ratio in ratios]
            print(f"| {name} | {' | '.join(columns)} |", flush=True)
            results[name] = speeds
        with web_server(folder) as address, contextlib.chdir(folder):
            url = f"{address}/data.tar"
            ways = {
                "stock": partial(stock_tar, url, flags.batch_size),
                "cold": partial(read_remote, url, flags.batch_size, cold=True),
                "warm": partial(read_remote, url, flags.batch_size, cold=False),
            }
            found = medians(ways, flags.rounds)
        speeds = results["tar at a URL"] = {way: flags.count / x for way, x in found.items()}
        columns = [f"{way} {speed:,.0f}" for way, speed in speeds.items()]
        columns += [f"{way} {speeds[way] / speeds['stock']:.2f}" for way in ("cold", "warm")]
        print(f"\ntar at a URL: {', '.join(columns[:3])}; beside stock: {', '.join(columns[3:])}")
    print(f"\nwritten: {record.write('sources', results)}")


def make_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.sources")
    parser.add_argument("--count", type=cli.positive, default=2000, help="images (default: 2000)")
    parser.add_argument("--side", type=cli.positive, default=128, help="pixels (default: 128)")
    parser.add_argument("--rounds", type=cli.positive, default=5, help="of each (default: 5)")
    parser.add_argument("--batch_size", type=cli.positive, default=64, help="(default: 64)")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
