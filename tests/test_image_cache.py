"""Decoded images that are kept on disk are those of the files, or are decoded again."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_images
from utils.data import cache
from utils.data.images import ImageConfig, ImageDataset

CONFIG = ImageConfig(cache_dir="kept", num_workers=0)


@pytest.fixture
def data(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "MIN_SECONDS", 0.0)
    return write_images(own_folder / "data", count=6)


def decoded(data: Path, config: ImageConfig = CONFIG, **options: object) -> tuple:
    dataset = ImageDataset(data, config, **options)
    images = torch.cat([*dataset.batches([torch.arange(len(dataset))], torch.device("cpu"))])
    settings = dataset.size, dataset.channels, dataset.value_range, dataset.resampling
    return images, settings, str(dataset)


def assert_same(one: tuple, other: tuple) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1:] == other[1:]


def test_kept_images_are_the_decoded_ones(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [{}, {"size": (8, 8)}, {"channels": 1}, {"random_crop": True, "size": (16, 16)}]
    first = [decoded(data, **one) for one in options]
    assert len([*Path("kept").iterdir()]) == len(options)
    for one, expected in zip(options, first, strict=True):
        assert_same(decoded(data, ImageConfig(cache_dir=""), **one), expected)
    monkeypatch.setattr(Image, "open", None)  # no file is read again
    for one, expected in zip(options, first, strict=True):
        assert_same(decoded(data, **one), expected)


def test_a_file_that_changed_is_decoded_again(data: Path) -> None:
    before = decoded(data)
    times = os.stat(data.with_name("3.png")).st_mtime_ns
    Image.new("RGB", (40, 24), "red").save(data.with_name("3.png"))
    os.utime(data.with_name("3.png"), ns=(times, times + 1))
    changed = (decoded(data)[0] != before[0]).flatten(1).any(dim=1)
    assert changed.tolist() == [number == 3 for number in range(6)]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "meta"])
def test_a_damaged_cache_is_written_again(data: Path, damage: str) -> None:
    before = decoded(data)
    (folder,) = Path("kept").iterdir()
    content = (folder / cache.PIXELS).read_bytes()
    if damage == "meta":
        (folder / cache.META).write_text("{")
    elif damage == "gone":
        (folder / cache.PIXELS).unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        (folder / cache.PIXELS).write_bytes(flipped if damage == "flip" else content[:-9])
    assert_same(decoded(data), before)
    assert (folder / cache.PIXELS).read_bytes() == content
    assert [*Path("kept").iterdir()] == [folder]


def test_what_another_process_has_just_written_is_no_trouble(data: Path) -> None:
    pixels, folder = np.zeros((2, 1, 4, 4), np.uint8), Path("kept/0.pixels")
    for value in (1, 2):
        cache.write(folder, pixels + np.uint8(value), {"value": value})
        found, meta = cache.read(folder, 100)
        assert (found == value).all()
        assert meta == {"value": value}
    assert cache.read(folder, 31) is None  # too large for the memory
    assert [*Path("kept").iterdir()] == [folder]


def test_without_room_or_permission_nothing_is_kept(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded(data, ImageConfig(cache_dir=""))
    assert not Path("kept").exists()
    Path("file").touch()
    assert_same(decoded(data, ImageConfig(cache_dir="file/kept")), expected)
    full = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert_same(decoded(data), expected)
    assert not [*Path("kept").iterdir()]


def test_the_data_sets_used_last_are_kept_and_nothing_else_is_removed(data: Path) -> None:
    Path("kept/mine").mkdir(parents=True)
    folders = [Path(f"kept/{number}.pixels") for number in range(cache.KEPT + 2)]
    for number, folder in enumerate(folders):
        cache.write(folder, np.zeros((1, 1, 1, 1), np.uint8), {})
        os.utime(folder, (number, number))
        cache.read(folders[0], 9)  # of which the time is now
    left = {path.name for path in Path("kept").iterdir()} - {"mine"}
    assert len(left) == cache.KEPT
    assert folders[0].name in left
    assert folders[1].name not in left
    assert Path("kept/mine").is_dir()
