"""One image file: its header, its pixels as 8-bit values, or the reason why it cannot be read."""

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, ImagePalette, PngImagePlugin, UnidentifiedImageError

from utils.cli import one_line
from utils.data.sources import open_file

MODES = {1: "L", 3: "RGB", 4: "RGBa"}  # by number of channels; a: premultiplied alpha
EIGHT_BITS = (0.0, 255.0)
FLOAT_RANGES = ((0.0, 1.0), (-1.0, 1.0), EIGHT_BITS, (0.0, 65535.0))
INTEGER_RANGES = tuple((0.0, 2.0**bits - 1) for bits in (8, 10, 12, 14, 16))
LARGEST_CLASS = 63  # of a label map
SAMPLED_VALUES = 10_000  # of a file, to decide the range of values
METADATA_BYTES = 64 << 20  # of a PNG file's texts, by chunk; Pillow refuses more than 1 MiB
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ORIENTATION = 0x0112  # the EXIF tag
# Pillow reads more formats, but starts other programs for some; these only decode.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
JPEG_START, JPEG_NAMES = b"\xff\xd8\xff", (".jpg", ".jpeg")
JPEG_HEAD = 1 << 16  # bytes that hold its frame header: height, width and number of components
JPEG_FRAME = re.compile(rb"\xff(?:[\xc0-\xc2]..\x08(..)(..)(.)|\xe1)", re.DOTALL)  # \xe1: EXIF
VERSION = 1  # of the values that files are decoded to; raised when they change
MAX_PIXELS = 64_000_000
TOO_MANY_PIXELS = "its header says more pixels than --max_pixels allows"

T = TypeVar("T")


class Header(NamedTuple):
    """The properties of an image file that are known before its pixels are read."""

    size: tuple[int, int]  # height, width in pixels, EXIF rotation applied
    grey: bool
    alpha: bool


@contextmanager
def open_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image file of one of `FORMATS`, whose pixels are read on first use.

    Raises an exception of any type where Pillow cannot read the file, and DecompressionBombError
    where its header, or a frame of it, says more than `max_pixels`.
    """
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    try:
        with warnings.catch_warnings():  # Pillow's, of odd files, do not name the file
            warnings.filterwarnings("ignore", module=r"PIL\.")
            # Pillow raises from twice the number of pixels on.
            halved: Any = max_pixels / 2
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = halved, METADATA_BYTES
            # Given a path, Pillow maps the file into memory, and garbles rotated TIFF files.
            with open_file(file) as stream, Image.open(stream, formats=FORMATS) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits


def complaint(file: str | Path, error: Exception) -> str:
    """The reason why Pillow could not read a file, in one line."""
    if isinstance(error, UnidentifiedImageError):
        with open_file(file) as stream:
            if not stream.read(1):
                return "the file is empty"
        if found := recognise(file):
            return f"not an image that can be read: {found}"
        return f"not an image file of a supported format: {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return TOO_MANY_PIXELS
    return one_line(error)


def _or_complaint(read: Callable[..., T]) -> Callable[..., T | str]:
    """Make a reader of files return the reason why it cannot read one, instead of raising it."""

    @functools.wraps(read)
    def wrapper(file: str | Path, *arguments: Any, **options: Any) -> T | str:
        try:
            return read(file, *arguments, **options)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises nearly every type on damaged files
            return complaint(file, error)

    return wrapper


@_or_complaint
def read_header(file: str, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of an image file, or the reason why it cannot be read, as a string."""
    with open_image(file, max_pixels) as image:
        return _header(image)


def _header(image: Image.Image) -> Header:
    width, height = image.size
    # Pillow has already swapped those of a TIFF file.
    rotated = image.format != "TIFF" and _has_rotation(image)
    if rotated and image.getexif().get(ORIENTATION) in ROTATED:
        height, width = width, height
    deep = _is_deep(image)
    grey = image.mode in ("1", "L", "LA") or deep
    if image.mode == "P" and image.palette is not None:
        grey = _is_grey(image.palette)
    return Header((height, width), grey, image.has_transparency_data and not deep)


def _has_rotation(image: Image.Image) -> bool:
    """Whether EXIF counts: in PNG files it may come after the pixels, unknown to the header."""
    return image.format != "PNG" or "exif" in image.info


def _is_grey(palette: ImagePalette.ImagePalette) -> bool:
    """Whether all colours of a palette are greys; its layout depends on the file format."""
    layout, colours = palette.getdata()
    image = Image.new("P", (1, 1))
    image.putpalette(colours, layout)
    red_green_blue = np.array(image.getpalette()).reshape(-1, 3)
    return bool((red_green_blue == red_green_blue[:, :1]).all())


def _is_deep(image: Image.Image) -> bool:
    """Whether the values are of 16 or 32 bits; their transparent value, if any, is ignored."""
    return image.mode == "F" or image.mode.startswith("I")


@_or_complaint
def sample_values(file: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Finite values of an image file from which `common_range` decides; none of transparent ones.

    They are the distinct values of 8-bit files and label maps, else some of all.
    """
    with open_image(file, max_pixels) as image:
        plain = image.mode in ("L", "RGB") and not image.has_transparency_data
        if image.format == "JPEG" or not (plain or _is_deep(image)):
            return np.array(EIGHT_BITS, np.uint8)
        return _sample(np.asarray(image))


def _sample(values: np.ndarray) -> np.ndarray:
    values = values[np.isfinite(values)]
    integers = not np.issubdtype(values.dtype, np.floating)
    if values.dtype == np.uint8 or (integers and values.max(initial=0) <= LARGEST_CLASS):
        return np.unique(values)
    return values[:: max(1, len(values) // SAMPLED_VALUES)]


def common_range(samples: Sequence[np.ndarray]) -> tuple[tuple[float, float], str]:
    """The values that become black and white, and the resampling, for the images of a data set.

    The smallest usual range that holds all but 0.1 % of the values at either end; where they fill
    less than a quarter of it, their own range. Integers of at most `LARGEST_CLASS` (beside 255,
    "no class") are label maps, which are resized to the nearest value.
    """
    deep = [x for x in samples if x.dtype != np.uint8 and x.size]
    values = np.concatenate([x for x in deep or samples if x.size] or [np.zeros(1, np.uint8)])
    if not np.issubdtype(values.dtype, np.floating):
        classes = values[values != EIGHT_BITS[1]]
        if 0 <= classes.min(initial=0) < classes.max(initial=0) <= LARGEST_CLASS:
            largest = classes.max() + (len(classes) < len(values))
            return (0.0, float(largest)), "nearest"
        ranges = INTEGER_RANGES
    else:
        ranges = FLOAT_RANGES
    low, high = (float(x) for x in np.quantile(values, (0.001, 0.999), method="nearest"))
    own = (low, high) if low < high else ranges[-1]
    usual = next((x for x in ranges if x[0] <= low and high <= x[1]), own)
    if low == high:  # of images of one value, which say nothing
        return (usual if ranges is FLOAT_RANGES or not deep else ranges[-1]), "bicubic"
    return (own if high - low < (usual[1] - usual[0]) / 4 else usual), "bicubic"


def _to_eight_bits(image: Image.Image, value_range: tuple[float, float] | None) -> Image.Image:
    """The values of a range as 0 to 255; Pillow's own conversion would clip them."""
    if not _is_deep(image):
        # 8-bit files among deeper ones already have their range.
        full = value_range in (None, EIGHT_BITS) or value_range[1] > EIGHT_BITS[1]
        if full or image.mode not in ("L", "RGB") or image.has_transparency_data:
            return image
    values = np.asarray(image).astype(np.float64)
    low, high = value_range or common_range([_sample(np.asarray(image))])[0]
    shades = (np.nan_to_num(values.clip(low, high), nan=low) - low) * (255 / (high - low))
    return Image.fromarray(np.rint(shades).astype(np.uint8))


@functools.cache
def _jpeg_decoder() -> Callable[..., torch.Tensor] | None:
    """torchvision's, by its library alone: importing torchvision takes longer than torch."""
    spec = find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("image*.so"):
            with suppress(OSError, AttributeError):
                torch.ops.load_library(library)
                return torch.ops.image.decode_jpeg
    return None


def _read_jpeg(file: str, channels: int, size: tuple[int, int]) -> np.ndarray | None:
    """The pixels of a JPEG file of this size and so many channels, in half of Pillow's time.

    They are those that Pillow decodes. None where it has to: for other files, rotated or broken.
    """
    with open_file(file) as stream:
        head = stream.read(JPEG_HEAD)
        frames = JPEG_FRAME.findall(head) if head.startswith(JPEG_START) else []
        wanted = (*size, channels)
        if not frames or any(tuple(map(int.from_bytes, x)) != wanted for x in frames):
            return None
        content = bytearray(head + stream.read())
    if (decode := _jpeg_decoder()) is not None:
        with suppress(RuntimeError):
            pixels = decode(torch.frombuffer(content, dtype=torch.uint8), 0, False)
            return pixels.permute(1, 2, 0).numpy()
    return None


@_or_complaint
def read_image(
    file: str,
    channels: int,
    size: tuple[int, int],
    max_pixels: int = MAX_PIXELS,
    value_range: tuple[float, float] | None = None,
    resampling: str = "bicubic",
) -> tuple[Header, np.ndarray]:
    """The header of an image file, and its pixels (height, width, channels), uint8.

    It is resized to cover `size`, then cropped. The values of `value_range` become 0 to 255 (None:
    those that `common_range` finds in the file, or all of 8-bit files), and NaN the lowest.
    Palettes and CMYK are converted, EXIF rotation is applied, and of an animation the first frame
    is used. With 4 channels, colours are premultiplied by alpha, so that hidden ones do not count;
    with fewer, transparency becomes white.

    Returns the reason as a string where the file cannot be read; only MemoryError is raised.
    """
    height, width = size
    is_jpeg = file.lower().endswith(JPEG_NAMES) and channels in (1, 3)
    is_jpeg = is_jpeg and value_range in (None, EIGHT_BITS) and height * width <= max_pixels
    if is_jpeg and (pixels := _read_jpeg(file, channels, size)) is not None:
        return Header(size, grey=channels == 1, alpha=False), pixels
    with open_image(file, max_pixels) as image:
        header = _header(image)
        if image.format == "JPEG":  # decodes at a fraction of the size where that is enough
            image.draft(None, (2 * max(size), 2 * max(size)))
        if _has_rotation(image):
            image = ImageOps.exif_transpose(image)
        image = _to_eight_bits(image, value_range)
        if image.has_transparency_data or channels == 4:
            image = image.convert("RGBA")
            if channels != 4:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
        image = image.convert(MODES[channels])
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling[resampling.upper()])
        return header, np.asarray(image).reshape(height, width, channels)


# --- files of other kinds -------------------------------------------------------------------------

CONVERT = "convert it to PNG or JPEG"
SAVE_SLICES = "save its slices as 16-bit PNG files"
DOWNLOAD = "download the image itself"
ISO_BRANDS = {
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "a HEIC image"),
}
# (offset, first bytes there): what the file is, and what to do
SIGNATURES = {
    (0, b"\x89PNG"): ("a PNG file", "save it again as PNG"),
    (0, b"\xff\xd8\xff"): ("a JPEG file", "save it again as JPEG"),
    (0, b"II*\0"): ("a TIFF file", "save it as a TIFF file of 8-bit, 16-bit or 32-bit values"),
    (0, b"MM\0*"): ("a TIFF file", "save it as a TIFF file of 8-bit, 16-bit or 32-bit values"),
    (0, b"II+\0"): ("a BigTIFF file", CONVERT),
    (0, b"GIF8"): ("a GIF file", CONVERT),
    (0, b"BM"): ("a BMP file", CONVERT),
    (8, b"WEBP"): ("a WebP file", CONVERT),
    (0, b"\0\0\0\x0cjP  "): ("a JPEG 2000 image", CONVERT),
    (0, b"\0\0\0\x0cJXL "): ("a JPEG XL image", CONVERT),
    (0, b"\xff\x0a"): ("a JPEG XL image", CONVERT),
    (0, b"8BPS"): ("a Photoshop file", CONVERT),
    (0, b"v/1\x01"): ("an OpenEXR image", CONVERT),
    (0, b"%PDF"): ("a PDF document", "render its pages to PNG files"),
    (0, b"%!PS"): ("a PostScript file", "render it to a PNG file"),
    (0, b"version https://git-lfs"): ("a Git LFS pointer", "fetch the file: git lfs pull"),
    (128, b"DICM"): ("a DICOM file", SAVE_SLICES),
    (344, b"n+1\0"): ("a NIfTI volume", SAVE_SLICES),
    (344, b"ni1\0"): ("a NIfTI volume", SAVE_SLICES),
    (0, b"\x93NUMPY"): ("a NumPy array", "save its images as PNG files"),
    (0, b"\x89HDF"): ("an HDF5 file", "save its images as PNG files"),
    (0, b"PK\x03\x04"): ("a ZIP archive", "unpack it"),
    (0, b"\x1f\x8b"): ("a gzip archive", "unpack it"),
}


def recognise(file: str | Path) -> str:
    """What a file is and what to do, by its first bytes; "" where they say nothing."""
    with open_file(file) as stream:
        start = stream.read(1024)
    found = next((x for (at, key), x in SIGNATURES.items() if start[at:].startswith(key)), None)
    if str(file).lower().endswith(".nii.gz"):
        found = "a NIfTI volume", SAVE_SLICES
    if start[4:8] == b"ftyp":
        found = ISO_BRANDS.get(start[8:12], "a video or another media file"), CONVERT
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<") and b"<svg" in text:
        found = "an SVG drawing", "render it to a PNG file"
    elif text.startswith((b"<!doctype html", b"<html")):
        found = "an HTML page, not the image that was to be downloaded", DOWNLOAD
    return f"it is {found[0]}; {found[1]}" if found else ""
