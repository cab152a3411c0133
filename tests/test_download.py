"""Public data sets as PNG files and a CSV that the pipeline takes."""

import argparse
import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.cli import UserError
from utils.data import download
from utils.data.images import ImageConfig, ImageDataset
from utils.data.sources import Row, read_rows, split_rows


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from sklearn.datasets import load_digits

    download.main(argparse.Namespace(name="digits", output_dir=str(tmp_path / "data")))
    path = tmp_path / "data" / "digits.csv"
    assert f"--path_to_data {path}" in capsys.readouterr().out.splitlines()[-1]

    rows = read_rows(path)
    expected = load_digits()
    assert [row.label for row in rows] == [str(label) for label in expected.target]
    train, val = split_rows(rows, val_fraction=0.5, seed=0)
    assert (len(train), len(val)) == (1437, 360)
    assert {rows[row].label for row in val.tolist()} == set("0123456789")
    dataset = ImageDataset(path, ImageConfig(num_workers=0))
    assert (dataset.size, dataset.channels) == ((8, 8), 1)
    pixels = np.rint(expected.images * 255 / 16)
    assert np.array_equal(dataset.pixels[:, 0].numpy(), pixels)


def test_digits_in_pairs(tmp_path: Path) -> None:
    """The condition of each is itself, every 2x2 pixels one."""
    download.main(argparse.Namespace(name="pairs", output_dir=str(tmp_path)))
    rows, low = read_rows(tmp_path / "pairs.csv"), read_rows(tmp_path / "low.csv")
    assert [row.condition_path for row in rows] == [row.image_path for row in low]
    assert [(row.label, row.split) for row in rows] == [(row.label, row.split) for row in low]
    for row in rows[::500]:
        large, small = (
            np.asarray(Image.open(tmp_path / path), dtype=float)
            for path in (row.image_path, row.condition_path)
        )
        assert np.allclose(small, large.reshape(4, 2, 4, 2).mean(axis=(1, 3)), atol=0.51)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of the MNIST files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))


def test_mnist_from_files_that_are_there(tmp_path: Path) -> None:
    raw = tmp_path / "download" / "MNIST" / "raw"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28))
    for split, labels in (("train", [7, 0, 7]), ("t10k", [1, 2])):
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels[: len(labels)])
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.array(labels))
    download.main(argparse.Namespace(name="mnist", output_dir=str(tmp_path)))
    assert [row.label for row in read_rows(tmp_path / "train.csv")] == ["7", "0", "7"]
    assert [row.label for row in read_rows(tmp_path / "test.csv")] == ["1", "2"]
    dataset = ImageDataset(tmp_path / "train.csv", ImageConfig(num_workers=0))
    assert torch.equal(dataset.pixels[:, 0].long(), torch.from_numpy(pixels))


def test_emoji_of_an_npm_package(tmp_path: Path) -> None:
    tones = {"1F3FB": {"image": "b.png"}, "1F3FB-1F3FF": {"image": "c.png"}}
    described = [
        {"name": "RED APPLE", "category": "Food", "image": "a.png"},
        {"name": "HANDSHAKE", "category": "People", "image": "d.png", "skin_variations": tones},
    ]
    with tarfile.open(tmp_path / f"{download.EMOJI}.tgz", "w:gz") as archive:
        for name in "abcd":
            Image.new("RGBA", (2, 2), name_colour(name)).save(tmp_path / f"{name}.png")
            archive.add(tmp_path / f"{name}.png", f"package/img/google/64/{name}.png")
        (tmp_path / "emoji.json").write_text(json.dumps(described))
        archive.add(tmp_path / "emoji.json", "package/emoji.json")
    download.main(argparse.Namespace(name="emoji", output_dir=str(tmp_path)))
    train = [(row.label, row.caption) for row in read_rows(tmp_path / "train.csv")]
    assert train == [
        ("People", "handshake, light skin tone"),
        ("People", "handshake, light and dark skin tone"),
        ("People", "handshake"),
    ]
    (row,) = read_rows(tmp_path / "test.csv")
    assert (row.label, row.caption) == ("Food", "red apple")
    with Image.open(tmp_path / row.image_path) as image:
        assert image.getpixel((0, 0)) == name_colour("a")


def name_colour(name: str) -> tuple[int, int, int, int]:
    return (ord(name), 0, 0, 255)


def test_no_emoji_package_is_one_line(tmp_path: Path) -> None:
    for content in (None, b"", b"no archive"):
        if content is not None:
            (tmp_path / f"{download.EMOJI}.tgz").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*google-16\.0\.0\.tgz .*npm pack"):
            download.main(argparse.Namespace(name="emoji", output_dir=str(tmp_path)))


def test_no_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    def offline(self: CIFAR10) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(CIFAR10, "download", offline)
    message = r"cannot download cifar10 from https://.* \(Name or service not known\).*download"
    with pytest.raises(UserError, match=message):
        download.write_download("cifar10", tmp_path)


def test_write_images(tmp_path: Path) -> None:
    items = [
        (Row(f"{value}.png", label, ""), Image.new("L", (4, 4), value))
        for value, label in ((3, "a,b"), (9, "0001"))
    ]
    download.write_images(tmp_path, "train", items)
    rows = read_rows(tmp_path / "train.csv")
    assert [row.label for row in rows] == ["a,b", "0001"]
    with Image.open(tmp_path / rows[1].image_path) as image:
        assert image.getpixel((0, 0)) == 9
