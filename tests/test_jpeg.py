"""JPEG files: the values that Pillow decodes, in less time where nothing else is to be done."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_decoding import read_image, save
from utils.data import decoding
from utils.data.decoding import Header


def test_large_jpeg_shrinks_to_the_same_picture(tmp_path: Path) -> None:
    """Read at a fraction of its size, it may not differ from the slow way, nor lose its middle."""
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (320, 640)).copy())
    fast = read_image(save(image, tmp_path / "a.jpg", quality=95), 1, (16, 16))
    slow = read_image(save(image, tmp_path / "a.png"), 1, (16, 16))
    assert np.abs(fast.astype(int) - slow).max() <= 3
    assert fast[0, 0, 0] == pytest.approx(64 + 4, abs=3)  # the left quarter is cut away


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (48, 33)])
def test_jpeg_files_have_the_values_that_pillow_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, options: dict, size: tuple
) -> None:
    pixels = np.random.default_rng(0).normal(0, 8, (*size, 3)).cumsum(0) + 128
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    file = save(image, tmp_path / "a.jpg", quality=90, **options)
    expected = np.asarray(Image.open(file)).reshape(*size, -1)
    monkeypatch.setattr(Image, "open", None)  # too slow
    header, seen = decoding.read_image(file, len(mode), size)
    assert header == Header(size, grey=mode == "L", alpha=False)
    assert np.array_equal(seen, expected)


def test_cmyk_jpeg_files_are_converted_for_any_number_of_channels(tmp_path: Path) -> None:
    inks = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    file = save(Image.fromarray(inks, "CMYK"), tmp_path / "a.jpg")
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(np.moveaxis(read_image(file, 3, (16, 16)), 0, 2), expected)
    seen = read_image(file, 4, (16, 16))
    assert np.array_equal(np.moveaxis(seen[:3], 0, 2), expected)
    assert (seen[3] == 255).all()


def test_without_torchvision_pillow_decodes_and_no_other_library_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.so").write_bytes(b"not a library")
    monkeypatch.setattr(decoding, "find_spec", lambda _: None)
    decoding._jpeg_decoder.cache_clear()
    assert decoding._jpeg_decoder() is None
    file = save(Image.new("L", (4, 4), 9), tmp_path / "a.jpg")
    assert (read_image(file, 1, (4, 4)) == 9).all()
    decoding._jpeg_decoder.cache_clear()


def test_jpeg_files_with_flipped_bits_are_those_of_pillow(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    content = Path(save(Image.fromarray(pixels), tmp_path / "a.jpg")).read_bytes()
    generator, read = random.Random(0), 0
    for number in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        plain, other = tmp_path / f"{number}.jpg", tmp_path / f"{number}.jpg.image"  # by Pillow
        plain.write_bytes(damaged)
        other.write_bytes(damaged)
        seen, expected = (read_image(str(x), 3, (16, 16)) for x in (plain, other))
        assert np.array_equal(seen, expected) or isinstance(seen, str) == isinstance(expected, str)
        read += not isinstance(seen, str)
    assert 100 < read < 300


def test_square_jpeg_files_are_rotated_as_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = 3
    halves = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 8, axis=0).repeat(16, 1))
    (seen,) = read_image(save(halves, tmp_path / "a.jpg", exif=exif), 1, (16, 16))
    assert seen[0].min() > 200
    assert seen[-1].max() < 50
