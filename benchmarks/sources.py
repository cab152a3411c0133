"""Each data source beside a stock reader of its format: images a second, in interleaved rounds.

Both decode with Pillow in this process and give batches in [-1, 1]. The stock readers are
torchvision's ImageFolder in a DataLoader, pyarrow row by row, and tarfile (WebDataset's way) in
the order of the file. Ours read in the order of the file, and in the random order of a training.
"""

import argparse
import io
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
from utils import cli
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


def stock_tar(path: Path, size: int) -> None:
    def members() -> Iterator[Image.Image]:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None and member.name.endswith(".jpg"):
                    yield Image.open(io.BytesIO(content.read()))

    read_batches(members(), size)


def read(dataset: ImageDataset, order: Tensor, size: int) -> None:
    for _ in dataset.batches(order.split(size), torch.device("cpu")):
        pass


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
