"""Decoded images are decoded once, and again when anything has changed."""

import os
import tarfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import cache, decoding, images
from utils.data.images import ImageConfig, ImageDataset

COUNT = 6


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of images, in whose parent the cache is; also few images are cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "CACHED_FILES", 0)
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    yield folder
    wait()


def wait() -> None:
    """Until all is written."""
    for thread in cache._writers:
        thread.join()


class Later:
    """A thread that begins late: its work, until `run` does it."""

    work: list[Callable[[], None]] = []  # noqa: RUF012

    def __init__(self, target: Callable[..., None], args: tuple) -> None:
        self.work.append(lambda: target(*args))

    def start(self) -> None:
        pass

    def join(self) -> None:
        pass

    @classmethod
    def run(cls) -> None:
        while cls.work:
            cls.work.pop()()


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


def test_the_cache_is_where_the_run_began(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "Thread", Later)
    ImageDataset(place)
    monkeypatch.chdir(place)
    Later.run()
    assert not list(place.glob("outputs/cache/*"))
    assert len(list(place.parent.glob("outputs/cache/*.npy"))) == 1


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


def test_a_changed_file_of_the_same_size_and_time_is_decoded_anew(tmp_path: Path) -> None:
    """As an archive with fixed times leaves it, unpacked over an older one."""
    for shade in (10, 200):
        Image.new("L", (4, 4), shade).save("a.bmp")
        os.utime("a.bmp", (0, 0))
        Path("data.csv").write_text("image_path\na.bmp\n")
        assert (ImageDataset("data.csv", value_range=(0, 255)).pixels == shade).all()


@pytest.mark.parametrize("name", ["photos.tar", "set.parquet", "photos"])
def test_a_changed_file_in_a_folder_of_any_name_is_decoded_anew(tmp_path: Path, name: str) -> None:
    Path(name).mkdir()
    for shade in (10, 200):
        Image.new("L", (4, 4), shade).save(f"{name}/a.png")
        Path("data.csv").write_text(f"image_path\n{name}/a.png\n")
        assert (ImageDataset("data.csv", value_range=(0, 255)).pixels == shade).all()


def test_a_changed_archive_is_decoded_anew(place: Path, tmp_path: Path) -> None:
    for shade in (10, 200):
        Image.new("L", (4, 4), shade).save(place / "a.png")
        with tarfile.open("data.tar", "w") as archive:
            archive.add(place / "a.png", "a.png")
        assert (ImageDataset("data.tar", value_range=(0, 255)).pixels == shade).all()


def test_other_versions_decode_anew(
    place: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ImageDataset(place)
    monkeypatch.setattr(decoding, "VERSION", decoding.VERSION + 1)
    ImageDataset(place)
    assert decoder.calls == 2 * COUNT


def test_cached_images_that_exceed_the_memory_are_streamed(place: Path) -> None:
    ImageDataset(place)
    assert ImageDataset(place, max_memory=10).pixels is None


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
    wait()
    assert not cache.CACHE.exists()


@pytest.mark.parametrize("end", [0, 9, -9])
@pytest.mark.parametrize("ending", ["npy", "json"])
def test_a_damaged_cache_is_made_again(
    place: Path, decoder: Decoder, ending: str, end: int
) -> None:
    expected = ImageDataset(place).pixels
    wait()
    for file in cache.CACHE.glob(f"*.{ending}"):
        file.write_bytes(file.read_bytes()[:end])
    assert torch.equal(ImageDataset(place).pixels, expected)
    ImageDataset(place)
    assert decoder.calls == 2 * COUNT


def test_the_longest_unused_go_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two sets: the third takes that of the second, as the first was used again."""
    monkeypatch.setattr(cache, "CACHE_BYTES", 4600)
    for side in (8, 9, 8, 10):
        for file in cache.CACHE.glob("*"):
            seconds = file.stat().st_mtime
            os.utime(file, (seconds, seconds - 100))
        ImageDataset(place, size=(side, side))
        wait()
    files = cache.CACHE.glob("*.npy")
    assert {np.load(file, mmap_mode="r").shape[1] for file in files} == {8, 10}


def test_a_disk_without_room_costs_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(ImageDataset(place).pixels) == COUNT
    wait()
    assert not list(cache.CACHE.iterdir())
    monkeypatch.undo()
    monkeypatch.chdir(place.parent)
    cache.CACHE.rmdir()
    cache.CACHE.write_text("a file")
    monkeypatch.setattr(images, "CACHED_FILES", 0)
    assert len(ImageDataset(place).pixels) == COUNT


def test_packages_of_unknown_version_are_not_cached(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(images, "version", unknown)
    assert len(ImageDataset(place)) == COUNT
    wait()
    assert not cache.CACHE.exists()


def test_one_process_writes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    ImageDataset(place)
    wait()
    assert not cache.CACHE.exists()
