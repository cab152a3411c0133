"""One image file: its header, and its pixels whatever the file holds."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, ImagePalette, UnidentifiedImageError

from utils.cli import UserError, one_line

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ORIENTATION = 0x0112  # the EXIF tag
# Of the many kinds that Pillow knows, some start other programs; these only decode.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 64_000_000
TOO_MANY_PIXELS = "its header says more pixels than --max_pixels allows"


class Header(NamedTuple):
    """What an image file says of itself before its pixels are read."""

    size: tuple[int, int]  # height, width in pixels, as it is looked at
    grey: bool
    alpha: bool


@contextmanager
def open_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image file of one of `FORMATS`, whose pixels are read when they are first asked for.

    Raises:
        Exception: of any type, where Pillow cannot read the file; Image.DecompressionBombError
            where its header, or a frame of it, says more than `max_pixels`.
    """
    _quieten()
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # where Pillow warns; it raises from twice that on
    # By its path Pillow maps the file into memory, and garbles rotated TIFF files.
    with open(file, "rb") as stream, Image.open(stream, formats=FORMATS) as image:
        yield image


@cache
def _quieten() -> None:
    """Have Pillow keep to itself what it says of odd files, without a name; once a process."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_header(file: str, max_pixels: int = MAX_PIXELS) -> Header | str:
    """The header of an image file, or what is wrong with it.

    Raises:
        MemoryError: there is too little, whatever the file holds.
    """
    try:
        with open_image(file, max_pixels) as image:
            width, height = image.size
            # Pillow has swapped those of a TIFF file already.
            rotated = image.format != "TIFF" and _says_rotation(image)
            if rotated and image.getexif().get(ORIENTATION) in ROTATED:
                height, width = width, height
            grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;")
            if image.mode == "P" and image.palette is not None:
                grey = _is_grey(image.palette)
            return Header((height, width), grey, image.has_transparency_data)
    except MemoryError:  # which says nothing about the file
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged files
        return complaint(file, error)


def _says_rotation(image: Image.Image) -> bool:
    """Whether EXIF counts: in PNG files it may stand after the pixels, where no header is."""
    return image.format != "PNG" or "exif" in image.info


def _is_grey(palette: ImagePalette.ImagePalette) -> bool:
    """Whether all colours of a palette are greys, in whatever order its format stores them."""
    layout, colours = palette.getdata()
    image = Image.new("P", (1, 1))
    image.putpalette(colours, layout)
    red_green_blue = np.array(image.getpalette()).reshape(-1, 3)
    return bool((red_green_blue == red_green_blue[:, :1]).all())


def complaint(file: str, error: Exception) -> str:
    """What Pillow has to say about a file that it could not read, in one line."""
    if os.path.exists(file) and os.path.getsize(file) == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"no image file of a kind that is read here: {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return TOO_MANY_PIXELS
    return one_line(error)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float images to 8 bits; Pillow's own conversion would clip them."""
    if image.mode == "F":
        values = np.asarray(image)
        values = values * 255 if values.max(initial=0) <= 1 else values
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        # 32-bit containers hold 16-bit values; a 16-bit white is 65535.
        values = values / 257 if values.max(initial=0) > 255 or image.mode != "I" else values
    else:
        return image
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def decode_image(
    file: str | Path, channels: int, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """An image file as a picture of the given size: resized to cover it, then cut in the middle.

    Palettes, CMYK and 16-bit values are converted, EXIF rotation is applied, of an animation the
    first frame is taken. Without an alpha channel in the result, transparent parts become white.

    Args:
        file: of one of `FORMATS`.
        channels: 1, 3 or 4.
        size: height and width.
        max_pixels: refuse a file whose header says more.

    Returns:
        (channels, height, width), uint8.

    Raises:
        Exception: of any type, where Pillow cannot read the file.
    """
    height, width = size
    with open_image(file, max_pixels) as image:
        if image.format == "JPEG":  # decodes at a fraction of the size where that is enough
            image.draft(None, (2 * max(size), 2 * max(size)))
        if _says_rotation(image):
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


def read_image(
    file: str | Path, channels: int, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> np.ndarray | str:
    """`decode_image`, or what is wrong with the file.

    Raises:
        MemoryError: there is too little, whatever the file holds.
    """
    try:
        return decode_image(file, channels, size, max_pixels)
    except MemoryError:  # which says nothing about the file
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged files
        return complaint(str(file), error)


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """The cells that stay, (h, w), bool: where a picture, shrunk to the grid, is rather white.

    Raises:
        UserError: no picture, or nothing is left to draw.
        MemoryError: there is too little to read it.
    """
    try:
        with open_image(path) as picture:
            mask = picture.convert("L").resize(size[::-1], Image.Resampling.BOX)
    except MemoryError:  # which says nothing about the file
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged files
        raise UserError(
            f"--mask {path} is neither a side as top:0.5 nor a picture that can be read: "
            f"{complaint(path, error)}"
        ) from error
    keep = np.asarray(mask) >= 128
    if keep.all():
        raise UserError(f"--mask {path} leaves nothing to draw; black cells are drawn")
    return keep
