"""Every kind of image file becomes the pixels that a viewer shows, or a complaint."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import figures
from utils.data import decoding
from utils.data.decoding import Header, read_header
from utils.data.masks import read_mask

WHITE, RED, CLEAR = (255, 255, 255), (200, 0, 0), (0, 0, 255, 0)
HALVES = np.repeat(np.array([[0, 255]], np.uint8), 3, axis=1)  # black left, white right


def save(image: Image.Image, file: Path, **options: object) -> str:
    image.save(file, **options)
    return str(file)


def read_image(file: str, channels: int, size: tuple[int, int], *limit: int) -> np.ndarray | str:
    """The pixels as (channels, height, width); they come with the header that is read alone."""
    result = decoding.read_image(file, channels, size, *limit)
    if isinstance(result, str):
        return result
    assert result[0] == read_header(file)
    return np.moveaxis(result[1], 2, 0)


def pixel(file: str, channels: int = 3) -> tuple[int, ...]:
    """The upper left pixel of the decoded file, at its own size."""
    header = read_header(file)
    assert isinstance(header, Header), header
    return tuple(read_image(file, channels, header.size)[:, 0, 0].tolist())


def palette_image(*colours: tuple[int, int, int]) -> Image.Image:
    """6x4 pixels of the first colour in a palette."""
    image = Image.new("P", (6, 4), 0)
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.mark.parametrize("ending", ["png", "gif", "bmp", "tif"])
def test_palette(tmp_path: Path, ending: str) -> None:
    """The palette of a BMP file has four bytes a colour, which was called a damaged file."""
    file = save(palette_image(RED, WHITE), tmp_path / f"a.{ending}")
    assert read_header(file) == Header((4, 6), grey=False, alpha=False)
    assert pixel(file) == RED
    greys = save(palette_image((7, 7, 7), (9, 9, 9)), tmp_path / f"grey.{ending}")
    assert read_header(greys).grey
    assert pixel(greys, 1) == (7,)


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_transparent_palette_entry_becomes_white_or_alpha(tmp_path: Path, ending: str) -> None:
    file = save(palette_image(RED, (0, 0, 0)), tmp_path / f"a.{ending}", transparency=0)
    assert read_header(file).alpha
    assert pixel(file) == WHITE
    assert pixel(file, 4)[3] == 0
    other = save(palette_image(RED, (0, 0, 0)), tmp_path / f"b.{ending}", transparency=1)
    assert pixel(other) == RED


def test_grey_with_alpha(tmp_path: Path) -> None:
    file = save(Image.new("LA", (6, 4), (100, 128)), tmp_path / "a.png")
    assert read_header(file) == Header((4, 6), grey=True, alpha=True)
    assert pixel(file, 4) == (50, 50, 50, 128)  # premultiplied
    assert pixel(file, 1)[0] == pytest.approx(100 * 128 / 255 + 255 * 127 / 255, abs=1)


def test_colour_with_alpha(tmp_path: Path) -> None:
    file = save(Image.new("RGBA", (6, 4), CLEAR), tmp_path / "a.png")
    assert read_header(file) == Header((4, 6), grey=False, alpha=True)
    assert pixel(file) == WHITE
    assert pixel(file, 4) == (0, 0, 0, 0)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    file = save(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), tmp_path / "a.jpg")
    assert read_header(file) == Header((4, 6), grey=False, alpha=False)
    red, green, blue = pixel(file)
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize(("value", "expected"), [(65535, 255), (0, 0), (257 * 200, 200), (200, 1)])
def test_16_bit_grey(tmp_path: Path, ending: str, value: int, expected: int) -> None:
    image = Image.fromarray(np.full((4, 6), value, np.uint16))
    file = save(image, tmp_path / f"a.{ending}")
    assert read_header(file) == Header((4, 6), grey=True, alpha=False)
    assert pixel(file, 1) == (expected,)
    assert pixel(file, 3) == (expected,) * 3


def test_1_bit(tmp_path: Path) -> None:
    file = save(Image.fromarray(HALVES).convert("1"), tmp_path / "a.png")
    assert read_header(file) == Header((1, 6), grey=True, alpha=False)
    assert read_image(file, 1, (1, 6)).tolist() == [[[0, 0, 0, 255, 255, 255]]]


@pytest.mark.parametrize(("scale", "ending"), [(1, "tif"), (255, "tif")])
def test_32_bit_float(tmp_path: Path, scale: int, ending: str) -> None:
    file = save(Image.fromarray(HALVES.astype(np.float32) / 255 * scale), tmp_path / f"a.{ending}")
    assert read_header(file) == Header((1, 6), grey=True, alpha=False)
    assert read_image(file, 1, (1, 6)).tolist() == [[[0, 0, 0, 255, 255, 255]]]


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_the_first_frame_of_an_animation(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, WHITE, (0, 0, 9))]
    file = save(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    with Image.open(file) as image:
        assert image.n_frames == 3
    assert pixel(file) == RED


# orientation: where the stored upper left corner is seen (top, left)
CORNERS = {1: (0, 0), 3: (1, 1), 6: (0, 1), 8: (1, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_exif_rotation(tmp_path: Path, ending: str, orientation: int) -> None:
    stored = np.full((16, 32), 255, np.uint8)
    stored[:8, :8] = 0
    file = str(tmp_path / f"a.{ending}")
    _save_rotated(Image.fromarray(stored), file, orientation)
    size = (32, 16) if orientation in (6, 8) else (16, 32)
    assert read_header(file).size == size
    (seen,) = read_image(file, 1, size)
    top, left = CORNERS[orientation]
    assert seen[-4 if top else 4, -4 if left else 4] < 20
    assert (seen < 128).sum() == 64


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_exif_rotation_of_16_bit_images(tmp_path: Path, ending: str) -> None:
    """Its EXIF was lost with the conversion to 8 bits, and a part of the image cut away."""
    stored = np.full((16, 32), 65535, np.uint16)
    stored[:8, :8] = 0
    file = str(tmp_path / f"a.{ending}")
    _save_rotated(Image.fromarray(stored), file, 6)
    assert read_header(file).size == (32, 16)
    (seen,) = read_image(file, 1, (32, 16))
    assert (seen[:8, -8:] == 0).all()
    assert seen.sum() == 255 * (16 * 32 - 64)


def _save_rotated(image: Image.Image, file: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if file.endswith("tif"):
        image.save(file, tiffinfo={0x0112: orientation})
    else:
        image.save(file, exif=exif)


def test_exif_behind_the_pixels_counts_neither_in_header_nor_in_pixels(tmp_path: Path) -> None:
    """The header said 16x32, but the pixels were rotated and lost their ends."""
    file = tmp_path / "a.png"
    _save_rotated(Image.fromarray(np.arange(512, dtype=np.uint8).reshape(16, 32)), str(file), 6)
    content = file.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    tail = content.index(b"IEND") - 4
    file.write_bytes(content[:start] + content[end:tail] + content[start:end] + content[tail:])
    assert read_header(str(file)).size == (16, 32)
    assert np.array_equal(
        read_image(str(file), 1, (16, 32))[0], np.arange(512, dtype=np.uint8).reshape(16, 32)
    )


@pytest.mark.parametrize(("content", "complaint"), [(b"", "empty"), (b"hello\n", "not an image")])
def test_what_is_no_image(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    for text in (read_header(str(file)), read_image(str(file), 3, (4, 4))):
        assert complaint in text
        assert "\n" not in text


def test_a_file_that_vanished_is_a_complaint(tmp_path: Path) -> None:
    assert "No such file" in read_header(str(tmp_path / "a.png"))


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "tif"])
def test_truncated(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    good = save(Image.fromarray(noise), tmp_path / f"good.{ending}")
    bad = tmp_path / f"bad.{ending}"
    bad.write_bytes(Path(good).read_bytes()[:-400])
    assert isinstance(read_image(good, 3, (32, 32)), np.ndarray)
    assert isinstance(complaint := read_image(bad, 3, (32, 32)), str)
    assert complaint


def test_flipped_bits_in_png_files_crash_nothing(tmp_path: Path) -> None:
    """torchvision's PNG decoder kills the process on most of such files."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "png")
    generator = random.Random(0)
    files = []
    for number in range(300):
        content = bytearray(stream.getvalue())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        files.append(str(tmp_path / f"{number}.png"))
        Path(files[-1]).write_bytes(content)
    complaints = [x for file in files if isinstance(x := read_image(file, 3, (16, 16)), str)]
    assert len(complaints) > 200
    assert all(text and "\n" not in text for text in complaints)
    for file in files:
        assert isinstance(read_header(file), Header | str)


@pytest.mark.parametrize(
    ("stored", "size", "kept"),
    [
        # height x width of the file, of the result, and (rows, columns) of the file that are seen
        ((8, 8), (4, 8), (slice(2, 6), slice(0, 8))),
        ((8, 8), (8, 4), (slice(0, 8), slice(2, 6))),
        ((12, 8), (8, 8), (slice(2, 10), slice(0, 8))),
        ((4, 16), (2, 2), (slice(0, 4), slice(6, 10))),
        ((24, 8), (2, 4), (slice(10, 14), slice(0, 8))),
    ],
)
def test_resized_to_cover_and_cut_in_the_middle(
    tmp_path: Path, stored: tuple, size: tuple, kept: tuple
) -> None:
    """What is cut away is 9, what is kept is 100: nothing of the one may show, nor be lost."""
    blur = 0 if stored[0] == size[0] or stored[1] == size[1] else 6  # of the edge, when resizing
    pixels = np.full(stored, 9, np.uint8)
    pixels[kept] = 100
    file = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert np.abs(read_image(file, 1, size).astype(int) - 100).max() <= blur
    pixels[kept][0], pixels[kept][-1] = 200, 0  # its first and last row must show as such
    file = save(Image.fromarray(pixels), tmp_path / "a.png")
    (seen,) = read_image(file, 1, size).astype(int)
    assert (seen[0] > 100).all()
    assert (seen[-1] < 100).all()


def test_halving_averages_what_lies_under_a_pixel(tmp_path: Path) -> None:
    pixels = np.kron(np.array([[10, 90], [50, 130]], np.uint8), np.ones((64, 64), np.uint8))
    checks = pixels + np.tile(np.array([[0, 20], [20, 0]], np.uint8), (64, 64))
    (seen,) = read_image(save(Image.fromarray(checks), tmp_path / "a.png"), 1, (64, 64))
    for quarter, value in (((8, 8), 20), ((8, 50), 100), ((50, 8), 60), ((50, 50), 140)):
        assert seen[quarter] == pytest.approx(value, abs=1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_allowed_are_refused_by_the_header_alone(tmp_path: Path) -> None:
    """A PNG file of 400 megapixels can be as small as 389 kB."""
    image = Image.new("L", (40, 30))
    for ending in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        file = save(image, tmp_path / f"a.{ending}")
        assert isinstance(read_header(file, 1200), Header)
        assert "--max_pixels" in read_header(file, 1199)
        assert isinstance(read_image(file, 1, (4, 4), 1200), np.ndarray)
        assert "--max_pixels" in read_image(file, 1, (4, 4), 1199)
    bomb = bytearray(Path(save(image, tmp_path / "bomb.png")).read_bytes())
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert "--max_pixels" in read_header(str(tmp_path / "bomb.png"))


def test_formats_that_start_other_programs_are_not_read(tmp_path: Path) -> None:
    """Pillow has Ghostscript run what an EPS file says."""
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert Image.open(file).format == "EPS"
    for text in (read_header(str(file)), read_image(str(file), 3, (4, 4))):
        assert "it is a PostScript file; render it to a PNG file" in text


def test_too_little_memory_is_no_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --skip_bad_images good files were left out while another program took the memory."""
    file = save(Image.new("RGB", (6, 4)), tmp_path / "a.png")

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    for read in (lambda: read_image(file, 3, (4, 6)), lambda: read_mask(Path(file))):
        with pytest.raises(MemoryError):
            read()
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        read_header(file)


def test_hidden_colours_do_not_count_and_visible_ones_come_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    pixels[:4, :, 3] = 0
    pixels[4:, :, 3] = pixels[4:, :, 3] | 128
    other = pixels.copy()
    other[:4, :, :3] = 77
    one, two = (
        save(Image.fromarray(array), tmp_path / f"{n}.png")
        for n, array in enumerate((pixels, other))
    )
    for size in ((8, 8), (4, 4), (6, 8)):
        assert np.array_equal(read_image(one, 4, size), read_image(two, 4, size))
    image = torch.from_numpy(read_image(one, 4, (8, 8)).copy()).float() / 127.5 - 1
    back = np.asarray(figures.to_pil(image)).astype(int)
    assert np.array_equal(back[..., 3], pixels[..., 3])
    assert np.abs(back[4:] - pixels[4:]).max() <= 2  # of 8-bit premultiplied colours


@pytest.mark.parametrize("value", [0.5, 1.01, np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("error")
def test_one_odd_value_changes_no_other(tmp_path: Path, value: float) -> None:
    """One NaN, or one pixel above 1, made the whole image black."""
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    ramp[0, 0] = value
    (seen,) = read_image(save(Image.fromarray(ramp), tmp_path / "a.tif"), 1, (64, 64))
    assert np.abs(seen[1:] - 255 * ramp[1:]).max() < 1
    whole = np.rint(ramp[1:] * 255).astype(np.int32)
    whole[0, 0] = 256
    (seen,) = read_image(save(Image.fromarray(whole), tmp_path / "b.tif"), 1, (63, 64))
    assert np.array_equal(seen[1:], whole[1:])


@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"zTXt", b"note\0\0"), (b"iTXt", b"XML:x\0\1\0\0\0"), (b"iCCP", b"profile\0\0")],
)
def test_intact_files_with_large_metadata(tmp_path: Path, kind: bytes, head: bytes) -> None:
    file = Path(save(Image.new("RGB", (6, 4), RED), tmp_path / "a.png"))
    body = head + zlib.compress(b"x" * 2_000_000)
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    file.write_bytes(file.read_bytes()[:33] + chunk + file.read_bytes()[33:])
    assert pixel(str(file)) == RED


KINDS = {
    b"\0\0\0\x18ftypheic\0\0\0\0": "a HEIC image",
    b"\0\0\0\x18ftypmif1\0\0\0\0": "a HEIC image",
    b"\0\0\0\x1cftypavif\0\0\0\0": "an AVIF image",
    b"\0\0\0\x1cftypavis\0\0\0\0": "an AVIF image",
    b"<svg viewBox='0 0 9 9'/>": "an SVG drawing",
    b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>': "an SVG drawing",
    b"%PDF-1.7\n": "a PDF document",
    b"<!DOCTYPE html><html>": "an HTML page",
    b"\n<html lang=en>": "an HTML page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git lfs pull",
    bytes(128) + b"DICM" + bytes(99): "a DICOM file",
    bytes(344) + b"n+1\0" + bytes(99): "a NIfTI volume",
    bytes(344) + b"ni1\0" + bytes(99): "a NIfTI volume",
    b"\x1f\x8b\x08\0": "a gzip archive",
    b"\x93NUMPY\x01\0": "a NumPy array",
    b"\x89PNG\r\n\x1a\n" + bytes(30): "a PNG file",
    b"II*\0" + bytes(30): "a TIFF file",
}


@pytest.mark.parametrize("content", KINDS)
def test_a_file_of_a_known_kind_is_called_by_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    for text in (read_header(str(file)), read_image(str(file), 3, (4, 4))):
        assert KINDS[content] in text
        assert "supported format" not in text


def test_the_transparent_value_of_16_bit_images_is_ignored(tmp_path: Path) -> None:
    """The header said four channels, of which the fourth was opaque everywhere."""
    image = Image.fromarray(np.array([[0, 30000], [65535, 9]], np.uint16))
    file = save(image, tmp_path / "a.png", transparency=0)
    assert read_header(file) == Header((2, 2), grey=True, alpha=False)
