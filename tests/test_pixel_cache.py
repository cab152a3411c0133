"""Decoded images are decoded once, and again when anything has changed."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import cache, decoding, images
from utils.data.images import ImageConfig, ImageDataset

COUNT = 6


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images, in whose parent the cache is; also few images are cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "CACHED_FILES", 0)
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


class Decoder:
    """decoding.read_image, with the number of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.read = 0, decoding.read_image
        monkeypatch.setattr(decoding, "read_image", self)

    def __call__(self, *arguments: object, **options: object) -> object:
        self.calls += 1
        return self.read(*arguments, **options)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    return Decoder(monkeypatch)


def test_the_second_run_decodes_nothing(place: Path, decoder: Decoder) -> None:
    first, second = ImageDataset(place), ImageDataset(place)
    assert decoder.calls == COUNT
    assert torch.equal(first.pixels, second.pixels)
    assert str(first) == str(second)
    for name in ("size", "channels", "value_range", "resampling", "resize_size"):
        assert getattr(first, name) == getattr(second, name)


def test_a_later_stage_that_gives_all_options_decodes_nothing(
    place: Path, decoder: Decoder
) -> None:
    first = ImageDataset(place)
    options = {"size": first.size, "channels": first.channels, "value_range": first.value_range}
    later = ImageDataset(place, resampling=first.resampling, **options)
    assert decoder.calls == COUNT
    assert torch.equal(first.pixels, later.pixels)


def test_what_is_changed_in_memory_stays_there(place: Path) -> None:
    ImageDataset(place)
    changed = ImageDataset(place).pixels
    before = changed.clone()
    changed.zero_()
    assert torch.equal(ImageDataset(place).pixels, before)


@pytest.mark.parametrize(
    "options", [{"size": (2, 2)}, {"channels": 1}, {"random_crop": True}, {"value_range": (0, 99)}]
)
def test_another_way_is_decoded_anew(place: Path, decoder: Decoder, options: dict) -> None:
    ImageDataset(place)
    seen = ImageDataset(place, **options)
    assert decoder.calls == 2 * COUNT
    assert torch.equal(seen.pixels, ImageDataset(place, **options).pixels)
    assert decoder.calls == 2 * COUNT


def test_a_changed_file_is_decoded_anew(place: Path, decoder: Decoder) -> None:
    ImageDataset(place)
    Image.new("RGB", (5, 4), (1, 2, 3)).save(place / "3.png")
    assert ImageDataset(place).pixels[3, :, 0, 0].tolist() == [1, 2, 3]
    (place / "4.png").rename(place / "9.png")
    ImageDataset(place)
    assert decoder.calls == 3 * COUNT


def test_bad_images_stay_left_out(place: Path, decoder: Decoder) -> None:
    (place / "2.png").write_bytes(b"no image")
    config = ImageConfig(skip_bad_images=1)
    first, second = ImageDataset(place, config), ImageDataset(place, config)
    assert decoder.calls == COUNT
    assert torch.equal(first.pixels, second.pixels)
    assert len(second) == COUNT - 1
    assert (first.skipped, first.files) == (second.skipped, second.files)


def test_streamed_images_are_not_cached(place: Path) -> None:
    ImageDataset(place, ImageConfig(stream=True))
    assert not cache.CACHE.exists()


@pytest.mark.parametrize("ending", ["npy", "json"])
def test_a_damaged_cache_is_made_again(place: Path, decoder: Decoder, ending: str) -> None:
    expected = ImageDataset(place).pixels
    for file in cache.CACHE.glob(f"*.{ending}"):
        file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(ImageDataset(place).pixels, expected)
    ImageDataset(place)
    assert decoder.calls == 2 * COUNT


def test_the_longest_unused_go_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = range(8, 12)
    monkeypatch.setattr(cache, "CACHE_BYTES", 2 * 3 * COUNT * max(sides) ** 2 + 300)
    for age, side in enumerate(sides):
        ImageDataset(place, size=(side, side))
        for file in cache.CACHE.glob("*.npy"):
            seconds = file.stat().st_mtime
            os.utime(file, (seconds, seconds - 10 * (len(sides) - age)))
    shapes = {np.load(file, mmap_mode="r").shape[1] for file in cache.CACHE.glob("*.npy")}
    assert shapes == {10, 11}


def test_a_disk_without_room_costs_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(ImageDataset(place).pixels) == COUNT
    assert not list(cache.CACHE.iterdir())


def test_one_process_writes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    ImageDataset(place)
    assert not cache.CACHE.exists()
