"""Files that are not images of a supported format: what they are, and what to do about them."""

from pathlib import Path

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
    with open(file, "rb") as stream:
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
