"""Parquet and Arrow files as data sources: paths or bytes, and what is wrong with them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from tests.conftest import write_images
from utils.cli import UserError
from utils.data import sources
from utils.data.images import ImageConfig, ImageDataset
from utils.data.sources import Row, tables

BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images and their CSV."""
    return write_images(tmp_path_factory.mktemp("images"), count=9, size=(6, 8))


def content(images: Path) -> list[bytes]:
    return [(images.parent / f"{number}.png").read_bytes() for number in range(9)]


def write(path: Path, **columns: Any) -> Path:
    """A table in row groups of four rows, or as Hugging Face datasets saves one."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=4)
    else:
        kind = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, kind(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return path


def pixels(dataset: ImageDataset) -> torch.Tensor:
    """All images, in an order that jumps between row groups."""
    order = torch.tensor([8, 0, 5, 1, 7, 2, 6, 3, 4])
    found = dataset.batches(order.split(2), torch.device("cpu"))
    return torch.cat(list(found))[order.argsort()]


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow", "file.arrow"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_images_as_from_a_csv(
    images: Path, tmp_path: Path, name: str, num_workers: int
) -> None:
    expected = ImageDataset(images)
    labels = [row.label for row in expected.rows]
    files = [{"bytes": one, "path": None} for one in content(images)]
    config = ImageConfig(stream=True, num_workers=num_workers)
    path = write(tmp_path / name, image=pa.array(files, BYTES), label=labels)
    dataset = ImageDataset(path, config)
    assert torch.equal(pixels(dataset), pixels(expected))
    assert dataset.rows[8] == Row(f"{name}/8", "a", "")
    assert torch.equal(ImageDataset(path).pixels, expected.pixels)
    if num_workers == 0:
        plain = write(images.parent / name, label=labels, pixels=content(images))
        assert torch.equal(pixels(ImageDataset(plain, config)), pixels(expected))
        paths = write(images.parent / f"paths.{name}", image_path=[f"{n}.png" for n in range(9)])
        assert torch.equal(pixels(ImageDataset(paths, config)), pixels(expected))


def test_columns(images: Path) -> None:
    paths = [f"{number}.png" for number in range(3)]
    columns = {"Image Path": paths, "label": [7, None, 1], "text": ["x", None, "y"]}
    path = write(images.parent / "a.parquet", **columns, split=["train", "val", "validation"])
    assert [*sources.read_rows(path)] == [
        Row("0.png", "7", "train", "", "x"),
        Row("1.png", "", "val", "", ""),
        Row("2.png", "1", "val", "", "y"),
    ]
    before = sources.digest(path)
    relabelled = write(images.parent / "b.parquet", **columns | {"label": [7, None, 2]})
    assert sources.digest(relabelled) != before


def test_names_of_classes(images: Path, tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": content(images)[:3], "label": [1, 0, -1]})
    parquet.write_table(table.replace_schema_metadata(about), tmp_path / "data.parquet")
    rows = sources.read_rows(tmp_path / "data.parquet")
    assert [row.label for row in rows] == ["dog", "cat", ""]


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"label": [1]}, "no column image_path, and none of bytes: label: int64"),
        ({"image": [b""], "label": [[1]]}, "column label is list<.*>; use text or whole numbers"),
        ({"image": [b""], "split": ["test"]}, "row 1: split is 'test'; use train or val"),
        ({"image_path": ["0.png", None]}, "row 2: image_path is empty"),
        ({"image_path": ["0.png", "gone.png"]}, r"1 of 2 files .* do not exist.*: gone\.png"),
        ({"image_path": ["../a.png"]}, "do not exist|outside"),
        ({"image": pa.array([], pa.binary())}, "lists no images"),
        ({"image": [b"", b""]}, "row 1 bad.parquet/0 .*the file is empty"),
        ({"image": [b"<html>"]}, "row 1 bad.parquet/0 .*HTML page"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_mistakes_are_named(images: Path, columns: dict, complaint: str, suffix: str) -> None:
    path = images.parent / f"bad.{suffix}"
    tables._open.cache_clear()
    tables._recent.clear()
    with pytest.raises(UserError, match=complaint.replace("parquet", suffix)):
        ImageDataset(write(path, **columns))


def test_a_row_without_bytes_is_named_and_can_be_skipped(images: Path, tmp_path: Path) -> None:
    files = [{"bytes": one, "path": "x.png"} for one in content(images)]
    files[6]["bytes"] = None
    path = write(tmp_path / "data.parquet", image=pa.array(files, BYTES))
    with pytest.raises(UserError, match=r"row 7 data\.parquet/6 \(column image has no bytes in"):
        ImageDataset(path)
    dataset = ImageDataset(path, ImageConfig(skip_bad_images=1))
    assert [row.image_path for row in dataset.rows[5:7]] == ["data.parquet/5", "data.parquet/7"]


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda _: b"", lambda _: b"a,b\n"])
def test_damaged_files(images: Path, tmp_path: Path, name: str, damage: Callable) -> None:
    path = write(tmp_path / name, image=content(images))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"cannot read .*{name} \(.*\); write or download it"):
        sources.read_rows(path)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.parquet", image=[b""])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs the package pyarrow: pip install pyarrow"):
        sources.read_rows(path)


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (200, 40_000), generator=generator, dtype=torch.uint8).numpy()
    path = write(tmp_path / "data.parquet", image=[row.tobytes() for row in noise])
    del generator
    bound = 1 << 20  # of 8 MB in 50 row groups
    monkeypatch.setattr(tables, "CACHE_BYTES", bound)
    before = pa.total_allocated_bytes()
    assert len(sources.read_rows(path)) == 200
    for row in range(200):
        with sources.open_file(path / str(row)) as file:
            assert file.read() == noise[row].tobytes()
        assert pa.total_allocated_bytes() - before < 1.5 * bound
    assert len(tables._recent) > 1
