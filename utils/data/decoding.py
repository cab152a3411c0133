"""One image file: its header, and its pixels whatever the file holds."""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, ImagePalette, UnidentifiedImageError

from utils.cli import UserError, one_line

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ORIENTATION = 0x0112  # the EXIF tag
# Pillow reads more formats, but starts other programs for some; these only decode.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
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
    logger, limit = logging.getLogger("PIL"), Image.MAX_IMAGE_PIXELS
    level = logger.level
    try:
        with warnings.catch_warnings():  # Pillow's, of odd files, do not name the file
            warnings.filterwarnings("ignore", module=r"PIL\.")
            logger.setLevel(logging.CRITICAL)
            # Pillow raises from twice this number on.
            Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
            # Given a path, Pillow maps the file into memory, and garbles rotated TIFF files.
            with open(file, "rb") as stream, Image.open(stream, formats=FORMATS) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        logger.setLevel(level)


def complaint(file: str | Path, error: Exception) -> str:
    """The reason why Pillow could not read a file, in one line."""
    if os.path.exists(file) and os.path.getsize(file) == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
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
        except MemoryError:  # which says nothing about the file
            raise
        except Exception as error:  # Pillow raises nearly every type on damaged files
            return complaint(file, error)

    return wrapper


@_or_complaint
def read_header(file: str, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of an image file, or the reason why it cannot be read, as a string."""
    with open_image(file, max_pixels) as image:
        width, height = image.size
        # Pillow has already swapped those of a TIFF file.
        rotated = image.format != "TIFF" and _has_rotation(image)
        if rotated and image.getexif().get(ORIENTATION) in ROTATED:
            height, width = width, height
        grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;")
        if image.mode == "P" and image.palette is not None:
            grey = _is_grey(image.palette)
        return Header((height, width), grey, image.has_transparency_data)


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


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float images to 8 bits; Pillow's own conversion would clip them."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        values = values * 255 if values.max(initial=0) <= 1 else values
    elif values.max(initial=0) > 255 or image.mode != "I":
        values = values / 257  # 32-bit containers hold 16-bit values; a 16-bit white is 65535
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


@_or_complaint
def read_image(
    file: str, channels: int, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """An image file as (channels, height, width), uint8: resized to cover `size`, then cropped.

    Palettes, CMYK and 16-bit values are converted, EXIF rotation is applied, and of an animation
    the first frame is used. With 1 or 3 channels, transparency becomes white.

    Returns the reason as a string where the file cannot be read; only MemoryError is raised.
    """
    height, width = size
    with open_image(file, max_pixels) as image:
        if image.format == "JPEG":  # decodes at a fraction of the size where that is enough
            image.draft(None, (2 * max(size), 2 * max(size)))
        if _has_rotation(image):
            image = ImageOps.exif_transpose(image)
        image = _to_eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if channels != 4:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
        image = image.convert(MODES[channels])
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
    return np.moveaxis(pixels.reshape(height, width, channels), 2, 0)


@_or_complaint
def _shrink(path: str, size: tuple[int, int]) -> Image.Image:
    with open_image(path) as picture:
        return picture.convert("L").resize(size[::-1], Image.Resampling.BOX)


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """The known positions, (h, w), bool: where a picture, shrunk to the latent grid, is light."""
    mask = _shrink(path, size)
    if isinstance(mask, str):
        raise UserError(
            f"--mask {path} is neither a side as top:0.5 nor a picture that can be read: {mask}"
        )
    keep = np.asarray(mask) >= 128
    if keep.all():
        raise UserError(
            f"--mask {path} leaves nothing to sample; paint the positions to sample black"
        )
    return keep
