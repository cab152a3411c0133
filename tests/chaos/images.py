"""Image files mutated at random, and a catalogue of odd ones: read, or refused in a line."""

import io
import multiprocessing
import os
import random
import resource
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.chaos.harness import Result
from utils.cli import UserError
from utils.data.decoding import METADATA_BYTES, Header, read_header, read_image
from utils.data.images import ImageConfig, ImageDataset

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SIDE = 24
PATIENCE = 600  # seconds for all files of a format


def run(count: int) -> Result:
    """`count` mutated files of each format, and the catalogue."""
    outcomes = {name: _in_a_process(_mutate_many, name, count) for name in FORMATS}
    outcomes["odd"] = _in_a_process(_read_catalogue)
    total: Counter[str] = Counter()
    for outcome in outcomes.values():
        total.update(outcome)
    skipped = _skip_some(min(count, 500))
    bad = {name: x["crashed"] + x["raised"] + x["wrong"] for name, x in outcomes.items()}
    failed = [name for name, number in bad.items() if number]
    detail = (
        f"{total['crashed']} crashes, {total['raised']} exceptions; of "
        f"{sum(x['files'] for x in outcomes.values()):,} files {total['refused']:,} refused; "
        f"at most {max(x['mebibytes'] for x in outcomes.values())} MiB; {skipped}"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return Result(total["files"], not failed and skipped.startswith("skipped"), detail)


def _in_a_process(work: Callable[..., Counter], *arguments: Any) -> Counter:
    """What `work` counts, or that its process crashed or hung."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_report, args=(theirs, work, *arguments))
    process.start()
    theirs.close()
    try:
        outcome = ours.recv() if ours.poll(PATIENCE) else Counter(crashed=1)
    except EOFError:  # it died
        outcome = Counter(crashed=1)
    process.kill()
    process.join()
    return outcome


def _report(connection: Any, work: Callable[..., Counter], *arguments: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = work(*arguments)
    outcome["mebibytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    connection.send(outcome)


def _look(path: str, outcome: Counter) -> bool | None:
    """Read a file as the data set does; whether it was read, None if that is no clear answer."""
    outcome["files"] += 1
    try:
        header, found = read_header(path), read_image(path, 3, (SIDE, SIDE))
    except Exception:
        outcome["raised"] += 1
        return None
    refused = [isinstance(x, str) and "\n" not in x and x != "" for x in (header, found)]
    kinds = isinstance(header, Header | str) and (refused[1] or found[1].shape == (SIDE, SIDE, 3))
    if not kinds:
        outcome["wrong"] += 1
    outcome["refused"] += any(refused)
    return not any(refused)


def _noise(form: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    pixels[SIDE // 2 :] = 90  # a half that compresses
    stream = io.BytesIO()
    options = {"exif": _rotation(6)} if form in ("PNG", "JPEG", "WEBP") else {}
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def _rotation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file with some bits flipped, bytes replaced, a part cut out, doubled or moved."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(max(1, len(changed)))
        near = rng.randrange(max(1, min(64, len(changed)))) if rng.random() < 0.5 else at
        length = rng.randrange(1, 32)
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[near] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[near : near + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[near : near + 4] = rng.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff")
            )
        else:
            del changed[at:]
    return bytes(changed)


def _mutate_many(form: str, count: int) -> Counter:
    rng, outcome, content = random.Random(form), Counter(), _noise(form)
    path = Path(f"mutated.{form.lower()}")
    for _ in range(count):
        path.write_bytes(mutated(content, rng))
        _look(str(path), outcome)
    return outcome


def _skip_some(count: int) -> str:
    """A data set in which some files are mutated: all bad ones named, or skipped as asked."""
    rng, folder = random.Random(0), Path("some")
    folder.mkdir()
    for number in range(count):
        content = _noise(FORMATS[number % len(FORMATS)])
        (folder / f"{number}.png").write_bytes(mutated(content, rng) if number % 3 else content)
    lines = "".join(f"{number}.png\n" for number in range(count))
    (folder / "data.csv").write_text(f"image_path\n{lines}")
    size = (SIDE, SIDE)
    dataset = ImageDataset(
        folder / "data.csv", ImageConfig(skip_bad_images=count, num_workers=2), size=size
    )
    bad = len(dataset.skipped)
    if not 0 < bad <= count - count // 3 or len(dataset) != count - bad:
        return f"of {count} files {len(dataset)} kept and {bad} skipped"
    try:
        config = ImageConfig(skip_bad_images=bad - 1, num_workers=2)
        ImageDataset(folder / "data.csv", config, size=size)
    except UserError as error:
        named = str(error).startswith(f"{bad} of {count} files")
        return f"skipped {bad} of {count} as asked" if named else str(error)
    return f"{bad} bad files were no error"


def _read_catalogue() -> Counter:
    """Odd files; each must be read or refused as the catalogue says."""
    outcome: Counter[str] = Counter()
    folder = Path("odd")
    folder.mkdir()
    for name, (content, readable) in _catalogue().items():
        (folder / name).write_bytes(content)
        if _look(str(folder / name), outcome) is not readable:
            print(f"{name}: {'refused' if readable else 'read'}", flush=True)
            outcome["wrong"] += 1
    os.mkdir(folder / "folder.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("none.png")
    for name in ("folder.png", "loop.png", "nowhere.png"):
        outcome["wrong"] += _look(str(folder / name), outcome) is not False
    return outcome


def _catalogue() -> dict[str, tuple[bytes, bool]]:
    """Odd files by name: their bytes, and whether they are to be read."""
    found: dict[str, tuple[bytes, bool]] = {}

    def add(name: str, image: Image.Image, form: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, form, **options)
        found[name] = stream.getvalue(), True
        return stream.getvalue()

    new, size = Image.new, (SIDE, SIDE)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        add(f"{mode.replace(';', '')}.png", new(mode, size), "PNG")
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"):
        add(f"{mode.replace(';', '')}.tif", new(mode, size), "TIFF")
    for mode in ("L", "RGB", "CMYK", "YCbCr"):
        add(f"{mode}.jpg", new(mode, size), "JPEG")
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        more = [new("RGB", size, colour) for colour in ("red", "green")]
        add(f"animated.{form}", new("RGB", size), form, save_all=True, append_images=more)
    add(
        "two-pictures.mpo", new("RGB", size), "MPO", save_all=True, append_images=[new("RGB", size)]
    )
    for orientation in range(10):
        for form in ("JPEG", "PNG", "WEBP"):
            name = f"turned{orientation}.{form}"
            add(name, new("RGB", (SIDE, 9)), form, exif=_rotation(orientation))
    for form in FORMATS:
        add(f"one-pixel.{form}", new("RGB", (1, 1)), form)
        add(f"a-line.{form}", new("RGB", (4000, 1)), form)
    png = add("clear.png", new("RGBA", size, (0, 0, 0, 0)), "PNG")
    add("profile.png", new("RGB", size), "PNG", icc_profile=b"no profile" * 100)
    add("progressive.jpg", new("RGB", size), "JPEG", progressive=True)
    add("transparent.gif", new("P", size), "GIF", transparency=0)
    found["png-named.jpg"] = png, True
    found["trailing.png"] = png + b"PK\x03\x04" * 999, True
    found["empty.png"] = b"", False
    found["text.png"] = b"these are words\n", False
    found["truncated.png"] = png[:-30], False
    found["web.png"] = b"<svg xmlns='http://www.w3.org/2000/svg'/>", False
    found["postscript.png"] = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n\nshowpage\n",
        False,
    )
    found["huge-header.png"] = _png(60_000, 60_000, b""), False
    found["bomb.png"] = _png(20_000, 20_000, zlib.compress(bytes(2500 * 20_000 + 20_000))), False
    found["largest-side.png"] = _png((1 << 31) - 1, 1, b""), False
    found["no-pixels.png"] = _png(0, 0, b""), False
    text = b"tEXt-bomb\0\0" + zlib.compress(bytes(2 * METADATA_BYTES))
    found["text-bomb.png"] = png[:33] + _chunk(b"zTXt", text) + png[33:], False
    found["huge-header.gif"] = b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3), False
    found["huge-header.bmp"] = _bmp(100_000, 100_000), False
    found["huge-header.ppm"] = b"P6 99999 99999 255\n", False
    found["huge-number.ppm"] = b"P6 " + b"9" * 5000 + b" 1 255\n", False
    return found


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def _png(width: int, height: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header
