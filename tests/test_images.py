"""Rows to batches: the same images from memory and streamed, and mistakes named."""

import csv
import os
import resource
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from utils.cli import UserError
from utils.data import images, workers
from utils.data.images import Augmentation, DataConfig, ImageConfig, ImageDataset
from vqvae import VQVAEConfig

CPU = torch.device("cpu")


def write_noise(folder: Path, count: int = 12, size: tuple[int, int] = (6, 10)) -> Path:
    """`count` RGB images of noise and their CSV."""
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return write_csv(folder, [f"{number}.png" for number in range(count)])


def write_csv(folder: Path, names: list[str]) -> Path:
    path = folder / "data.csv"
    path.write_text("image_path\n" + "".join(f"{name}\n" for name in names))
    return path


def batches(dataset: ImageDataset, size: int = 5, **augmentation: object) -> torch.Tensor:
    """All images, read in batches of `size`."""
    rows = torch.arange(len(dataset)).flip(0)
    chosen = Augmentation(**augmentation) if augmentation else None
    return torch.cat(list(dataset.batches(rows.split(size), CPU, chosen))).flip(0)


def test_values_and_shape(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = ImageDataset(write_csv(tmp_path, ["a.png"]))
    assert (dataset.size, dataset.channels, len(dataset)) == ((2, 4), 3, 1)
    (image,) = batches(dataset)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(image, expected, atol=1e-6)
    assert image.dtype == torch.float32


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_memory_and_streamed_are_the_same(tmp_path: Path, num_workers: int) -> None:
    path = write_noise(tmp_path)
    kept = ImageDataset(path, random_crop=True)
    streamed = ImageDataset(
        path, ImageConfig(num_workers=num_workers), random_crop=True, max_memory=0
    )
    assert kept.pixels is not None
    assert streamed.pixels is None
    assert "in memory" in str(kept)
    assert "streamed" in str(streamed)
    for options in ({}, {"horizontal_flip": True, "random_crop": True, "seed": 1, "epoch": 2}):
        assert torch.equal(batches(kept, **options), batches(streamed, **options))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_many_files_are_decoded_by_processes_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    monkeypatch.setattr(workers, "START", start)  # spawn: where there is no fork
    Image.new("L", (2, 2), 0).save(tmp_path / "0.png")
    Image.new("L", (2, 2), 255).save(tmp_path / "1.png")
    names = [f"{number % 3 % 2}.png" for number in range(1100)]
    dataset = ImageDataset(write_csv(tmp_path, names), ImageConfig(num_workers=2))
    expected = torch.tensor([255 * (number % 3 % 2) for number in range(1100)])
    assert torch.equal(dataset.pixels[:, 0, 1, 1].long(), expected)


def test_mixed_sizes_are_refused_with_the_sizes_found(tmp_path: Path) -> None:
    Image.new("L", (4, 8)).save(tmp_path / "a.png")
    Image.new("L", (9, 5)).save(tmp_path / "b.png")
    path = write_csv(tmp_path, ["a.png", "a.png", "b.png"])
    with pytest.raises(
        UserError, match=r"not of one size: 8x4 \(a.png\), 5x9 \(b.png\); --image_size"
    ):
        ImageDataset(path)
    assert batches(ImageDataset(path, size=(6, 3))).shape == (3, 1, 6, 3)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [
        (("L", "1", "I;16"), 1),
        (("L", "RGB"), 3),
        (("RGBA", "LA"), 4),
        (("RGBA", "RGB"), 3),
        (("LA", "L"), 1),
    ],
)
def test_channels_are_what_all_images_have(tmp_path: Path, modes: tuple, channels: int) -> None:
    for number, mode in enumerate(modes):
        Image.new(mode, (4, 4)).save(tmp_path / f"{number}.png")
    path = write_csv(tmp_path, [f"{number}.png" for number in range(len(modes))])
    assert ImageDataset(path).channels == channels
    for wanted in (1, 3, 4):
        assert batches(ImageDataset(path, channels=wanted)).shape == (len(modes), wanted, 4, 4)


UNSAMPLED = 1  # a row of 150 whose header is not among those that are looked at first


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_one_image_unlike_the_others_counts(tmp_path: Path, mode: str) -> None:
    others = "RGBA" if mode == "LA" else "L"
    Image.new(others, (4, 4)).save(tmp_path / "a.png")
    Image.new(mode, (4, 4), (200, 0, 0, 255)[: len(mode)]).save(tmp_path / "b.png")
    path = write_csv(tmp_path, ["b.png" if row == UNSAMPLED else "a.png" for row in range(150)])
    dataset = ImageDataset(path)
    assert torch.equal(dataset.pixels, ImageDataset(path, channels=dataset.channels).pixels)
    assert dataset.channels == {"RGB": 3, "RGBA": 3, "LA": 4}[mode]
    assert ImageDataset(path, max_memory=0).channels == dataset.channels


def test_one_image_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("L", (4, 8)).save(tmp_path / "a.png")
    Image.new("L", (9, 5)).save(tmp_path / "b.png")
    path = write_csv(tmp_path, ["b.png" if row == UNSAMPLED else "a.png" for row in range(150)])
    for max_memory in (0, None):
        with pytest.raises(UserError, match=r"8x4 \(a.png\), 5x9 \(b.png\); --image_size"):
            ImageDataset(path, max_memory=max_memory)


def test_the_good_images_are_found_where_all_of_the_first_sample_are_bad(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "good.png")
    names = ["bad.png" if row % 2 == 0 else "good.png" for row in range(128)]
    dataset = ImageDataset(write_csv(tmp_path, names), ImageConfig(skip_bad_images=64))
    assert (len(dataset), dataset.size, dataset.channels) == (64, (2, 3), 3)
    assert dataset.pixels[:, :, 0, 0].tolist() == [[1, 2, 3]] * 64


def test_a_second_pass_takes_no_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels of the first pass are gone before those of the second are made."""
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    path = write_csv(tmp_path, ["b.png" if row == UNSAMPLED else "a.png" for row in range(150)])
    made: list[weakref.ref] = []

    def shared_memory(shape: tuple[int, ...]) -> torch.Tensor:
        assert all(memory() is None for memory in made)
        memory = torch.empty(shape, dtype=torch.uint8)
        made.append(weakref.ref(memory.untyped_storage()))
        return memory

    monkeypatch.setattr(images, "shared_memory", shared_memory)
    assert ImageDataset(path).channels == 3
    assert len(made) == 2


AUGMENTED = {"horizontal_flip": True, "random_crop": True, "seed": 0, "epoch": 0}


def test_augmentation_follows_from_seed_epoch_and_row(tmp_path: Path) -> None:
    dataset = ImageDataset(write_noise(tmp_path, size=(16, 24)), random_crop=True)
    seen = batches(dataset, **AUGMENTED)
    for size in (1, 7, 12):
        assert torch.equal(seen, batches(dataset, size, **AUGMENTED))
    few = torch.tensor([9, 2])
    (alone,) = dataset.batches([few], CPU, Augmentation(**AUGMENTED))
    assert torch.equal(alone, seen[few])
    for change in ({"seed": 1}, {"epoch": 1}):
        other = batches(dataset, **AUGMENTED | change)
        assert (other != seen).flatten(1).any(1).sum() > 6


def test_flips_mirror_about_half_of_the_images(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "a.png")
    dataset = ImageDataset(write_csv(tmp_path, ["a.png"] * 400))
    seen = batches(dataset, 400, **AUGMENTED | {"random_crop": False})[:, 0, 0]
    mirrored = seen[:, 0] == 1
    assert torch.equal(seen[:, 1] == 1, ~mirrored)
    assert 150 < mirrored.sum() < 250


def test_crops_reach_every_corner_and_evaluation_takes_the_middle(tmp_path: Path) -> None:
    canvas = np.arange(18 * 27, dtype=np.int64).reshape(18, 27) % 251
    Image.fromarray(canvas.astype(np.uint8)).save(tmp_path / "a.png")
    dataset = ImageDataset(write_csv(tmp_path, ["a.png"] * 300), size=(16, 24), random_crop=True)
    assert dataset.resize_size == (18, 27)
    windows = {
        canvas[top : top + 16, left : left + 24].astype(np.uint8).tobytes(): (top, left)
        for top in range(3)
        for left in range(4)
    }

    def places(images: torch.Tensor) -> set:
        pixels = ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        return {windows[image.tobytes()] for image in pixels}

    assert places(batches(dataset, 300, **AUGMENTED | {"horizontal_flip": False})) == set(
        windows.values()
    )
    assert places(batches(dataset)) == {(1, 1)}


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named_with_its_row(tmp_path: Path, num_workers: int) -> None:
    path = write_noise(tmp_path, size=(32, 32))
    damage(tmp_path / "7.png")
    with pytest.raises(UserError, match=r"1 of 12 files .* row 8 7\.png \(.*truncated"):
        ImageDataset(path)
    streamed = ImageDataset(path, ImageConfig(num_workers=num_workers), max_memory=0)
    with pytest.raises(UserError, match=r"row 8 7\.png \(.*truncated"):
        batches(streamed)


def test_what_is_no_image_is_named_before_any_is_decoded(tmp_path: Path) -> None:
    path = write_noise(tmp_path)
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "5.png").write_text("hello")
    message = r"2 of 12 files .* row 4 3\.png \(the file is empty\), row 6 5\.png \(not an image"
    with pytest.raises(UserError, match=message):
        ImageDataset(path, max_memory=0)


def test_a_file_that_vanishes_while_streaming_is_named(tmp_path: Path) -> None:
    """It ended in a FileNotFoundError."""
    dataset = ImageDataset(write_noise(tmp_path), ImageConfig(num_workers=0), max_memory=0)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"row 3 2\.png \(.*No such file"):
        batches(dataset)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_val_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="val_fraction"):
        DataConfig(path_to_data="data.csv", val_fraction=fraction)


def hurt(folder: Path) -> Path:
    """The CSV of twelve images: one is not an image, two are truncated."""
    path = write_noise(folder, size=(32, 32))
    (folder / "3.png").write_text("hello")
    for name in ("7.png", "9.png"):
        damage(folder / name)
    return path


@pytest.mark.parametrize("max_memory", [None, 0])
def test_bad_images_are_left_out_as_asked(
    tmp_path: Path, max_memory: int | None, capsys: pytest.CaptureFixture
) -> None:
    """Found before the first batch also where images are streamed: the order must not change."""
    path = hurt(tmp_path)
    dataset = ImageDataset(
        path, ImageConfig(skip_bad_images=3, num_workers=0), max_memory=max_memory
    )
    kept = [number for number in range(12) if number not in (3, 7, 9)]
    assert [row.image_path for row in dataset.rows] == [f"{number}.png" for number in kept]
    whole = write_csv(tmp_path, [f"{number}.png" for number in kept])
    assert torch.equal(batches(dataset), batches(ImageDataset(whole)))

    dataset.write_skipped(tmp_path)
    (said,) = capsys.readouterr().out.splitlines()
    assert said == f"skipped 3 bad images, listed in {tmp_path / 'skipped.csv'}"
    lines = list(csv.DictReader((tmp_path / "skipped.csv").open()))
    assert [(line["row"], line["image_path"]) for line in lines] == [
        ("4", "3.png"),
        ("8", "7.png"),
        ("10", "9.png"),
    ]
    assert "not an image" in lines[0]["complaint"]
    assert "truncated" in lines[1]["complaint"]


def test_more_bad_images_than_may_be_left_out(tmp_path: Path) -> None:
    path = hurt(tmp_path)
    with pytest.raises(UserError, match=r"1 of 12 .* row 4 3\.png .*--skip_bad_images 1$"):
        ImageDataset(path, max_memory=0)  # its header alone says that it is bad
    for skipped in (0, 2):
        with pytest.raises(
            UserError, match=r"3 of 12 .* row 8 7\.png .* row 10 9\.png .*images 3$"
        ):
            ImageDataset(path, ImageConfig(skip_bad_images=skipped))
    (tmp_path / "data.csv").write_text("image_path\n3.png\n3.png\n")
    with pytest.raises(UserError, match="2 of 2 files"):
        ImageDataset(path, ImageConfig(skip_bad_images=2))


def test_max_pixels(tmp_path: Path) -> None:
    path = write_noise(tmp_path, 2)
    with pytest.raises(UserError, match=r"2 of 2 .*; raise --max_pixels.*") as refused:
        ImageDataset(path, ImageConfig(max_pixels=59))
    assert "--skip_bad_images" not in str(refused.value)  # which would leave nothing
    assert len(ImageDataset(path, ImageConfig(max_pixels=60))) == 2


def test_no_memory_for_the_pixels_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(workers.mmap, "mmap", full)
    with pytest.raises(UserError, match=r"Cannot allocate memory.*--stream"):
        ImageDataset(write_noise(tmp_path))


def test_limits_of_the_process_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_noise(tmp_path)
    assert ImageDataset(path, ImageConfig(stream=True)).pixels is None
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
        assert ImageDataset(path).num_workers == 1
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used, used))
    assert ImageDataset(path).pixels is None
    monkeypatch.undo()
    (tmp_path / "max").write_text("9000000")
    (tmp_path / "current").write_text("8999900")
    (tmp_path / "stat").write_text("total_inactive_file 9000000\ninactive_file 0\n")
    names = [tuple(tmp_path / name for name in ("max", "current", "stat"))]
    monkeypatch.setattr(workers, "CGROUP_FILES", names)
    assert ImageDataset(path).pixels is None
    (tmp_path / "stat").write_text("anon 0\ninactive_file 900000\n")  # which is given up
    assert ImageDataset(path).pixels is not None
    (tmp_path / "max").write_text("max")
    assert ImageDataset(path).pixels is not None


def scan(low: float, high: float, dtype: type, ending: str = "tif") -> tuple:
    """Ramps of different contrast."""
    ramp = np.linspace(low, high, 256).reshape(16, 16)
    return [(low + (ramp - low) * share).astype(dtype) for share in (0.3, 1, 0.7)], ending


def labels(*values: int) -> tuple:
    generator = np.random.default_rng(0)
    blocks = [np.append(values, generator.choice(values, 64 - len(values))) for _ in range(3)]
    return [np.kron(x.reshape(8, 8), np.ones((4, 4))).astype(np.uint8) for x in blocks], "png"


@pytest.mark.parametrize(
    ("data", "expected", "resampling"),
    [
        (scan(0, 4095, np.uint16, "png"), (0, 4095), "bicubic"),  # 12-bit in 16-bit files
        (scan(0, 1000, np.uint16), (0, 1023), "bicubic"),
        (scan(0, 60000, np.uint16), (0, 65535), "bicubic"),
        (scan(7000, 9000, np.uint16), (7000, 9000), "bicubic"),  # a thermal camera
        (scan(-1000, 3000, np.int32), (-1000, 3000), "bicubic"),  # Hounsfield units
        (scan(0, 1, np.float32), (0, 1), "bicubic"),
        (scan(-1, 1, np.float32), (-1, 1), "bicubic"),
        (scan(0, 255, np.float32), (0, 255), "bicubic"),
        (scan(273.1, 310.5, np.float32), (273.1, 310.5), "bicubic"),
        (scan(0, 255, np.uint8), (0, 255), "bicubic"),
        (scan(30, 200, np.uint8), (0, 255), "bicubic"),  # a photograph of little contrast
        (labels(*range(8)), (0, 7), "nearest"),
        (labels(0, 1), (0, 1), "nearest"),
        (labels(*range(21), 255), (0, 21), "nearest"),  # 255: no class
        (labels(0, 255), (0, 255), "bicubic"),
    ],
)
def test_the_range_of_values_is_that_of_the_data_set(
    tmp_path: Path, data: tuple, expected: tuple, resampling: str
) -> None:
    """Files that use a small part of their range became nearly black, in silence."""
    arrays, ending = data
    names = [f"{number}.{ending}" for number in range(len(arrays))]
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(array).save(tmp_path / name)
    dataset = ImageDataset(write_csv(tmp_path, names))
    assert dataset.value_range == pytest.approx(expected, rel=0.01)
    assert dataset.resampling == resampling
    low, high = dataset.value_range
    shades = [(array.astype(float).clip(low, high) - low) / (high - low) for array in arrays]
    assert np.abs(dataset.pixels[:, 0].numpy() - 255 * np.stack(shades)).max() < 1
    assert (", values " in str(dataset)) == (expected != (0, 255))
    options = VQVAEConfig(value_range=(low, high + 1), resampling="nearest").image_options
    other = ImageDataset(tmp_path / "data.csv", **options)
    assert (other.value_range, other.resampling) == ((low, high + 1), "nearest")


def test_label_maps_are_resized_without_new_values(tmp_path: Path) -> None:
    (array, *_), _ = labels(0, 3, 7)
    Image.fromarray(array).save(tmp_path / "0.png")
    path = write_csv(tmp_path, ["0.png"])
    for size in ((24, 24), (48, 48), (20, 28)):
        assert set(ImageDataset(path, size=size).pixels.unique().tolist()) == {0, 109, 255}


def test_8_bit_files_among_deeper_ones_keep_their_values(tmp_path: Path) -> None:
    ramp = np.arange(256).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "0.png")
    Image.fromarray((ramp * 16).astype(np.uint16)).save(tmp_path / "1.png")
    shallow, deep = ImageDataset(write_csv(tmp_path, ["0.png", "1.png"])).pixels[:, 0].numpy()
    assert np.array_equal(shallow, ramp)
    assert np.abs(deep.astype(int) - ramp).max() <= 1
