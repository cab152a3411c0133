"""CSV files and text files of indices that hypothesis makes up: exit code 0 or 2, no traceback."""

import contextlib
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from tests.chaos.harness import ROOT, Result
from tests.conftest import parsed
from utils import cli
from utils.data.indices import read_indices
from utils.data.sources import read_rows, split_rows

WORDS = st.text(max_size=12)
COLUMNS = st.sampled_from(["image_path", "label", "split", " image_path", "IMAGE_PATH", "x", ""])
CELLS = st.one_of(
    st.sampled_from(["0.png", "1.png", "./0.png", "link.png", "..", "../x.png", "/etc/passwd"]),
    st.sampled_from(["train", "val", "test", "", "NA", "0001", "nan", '"', '""', "a\0b", "\ud800"]),
    WORDS,
)


def _lines(fields: st.SearchStrategy[str], separators: list[str]) -> st.SearchStrategy[str]:
    line = st.tuples(st.lists(fields, max_size=6), st.sampled_from(separators))
    joined = line.map(lambda pair: pair[1].join(pair[0]))
    return st.tuples(
        st.lists(joined, max_size=8), st.sampled_from(["\n", "\r\n", "\r", "\n\n"])
    ).map(lambda pair: pair[1].join(pair[0]))


def _bytes(text: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    codes = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
    encoded = st.tuples(text, codes).map(lambda pair: pair[0].encode(pair[1], "replace"))
    return st.one_of(encoded, encoded, st.binary(max_size=200))


def _or_good(files: st.SearchStrategy[bytes], good: st.SearchStrategy[str]) -> st.SearchStrategy:
    return st.one_of(files, good.map(lambda text: text.encode("utf-8", "replace")))


def _nearly(rows: st.SearchStrategy[list[str]]) -> st.SearchStrategy[str]:
    """Lines that are right, in which now and then one is something else."""
    lines = st.lists(st.one_of(rows.map("".join), rows.map("".join)), min_size=1, max_size=6)
    other = st.one_of(st.just(""), st.just(""), WORDS)
    return st.tuples(lines, other).map(
        lambda pair: "".join(line + "\n" for line in pair[0]) + pair[1]
    )


FILES = st.sampled_from(["0.png", "1.png", "./0.png", "link.png", "1.png"])
LABELS = st.one_of(st.sampled_from(["a", "0001", '"x,y"', ""]), WORDS)
GOOD_TABLES = _nearly(st.tuples(FILES, st.just(","), LABELS).map(list)).map(
    "image_path,label\n".__add__
)
GOOD_TEXTS = _nearly(st.lists(st.integers(0, 16).map("{} ".format), min_size=4, max_size=4))
HEADERS = st.lists(COLUMNS, min_size=1, max_size=4).map(",".join)
TABLES = _bytes(
    st.tuples(
        st.one_of(HEADERS, st.sampled_from(["image_path", "image_path,label,split"])),
        _lines(CELLS, [",", ",", ";", "\t"]),
    ).map("\n".join)
)
NUMBERS = st.one_of(
    st.integers(0, 20).map(str),
    st.integers(0, 20).map(str),
    st.sampled_from(["-1", "1.0", "1e3", "٣", "²", "0" * 30, "9" * 30, "9" * 5000, "+1", "0x1"]),
    WORDS,
)
TEXTS = _bytes(_lines(NUMBERS, [" ", " ", "  ", "\t", ","]))


def run(count: int) -> Result:
    """`count` CSV files and as many text files of indices."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(name)
    Path("link.png").symlink_to("0.png")
    codes: Counter[object] = Counter()
    _try_all(_or_good(TABLES, GOOD_TABLES), Path("data.csv"), _use_table, codes, count)
    _try_all(_or_good(TEXTS, GOOD_TEXTS), Path("indices.txt"), _use_text, codes, count)
    scripts = _try_scripts(max(1, count // 1000))
    seen = ", ".join(f"{number:,} x exit code {code}" for code, number in codes.items())
    return Result(
        codes.total() + sum(scripts.values()),
        set(codes) | set(scripts) <= {0, 2} and codes[0] > 0 and codes[2] > 0,
        f"{seen}; the scripts themselves: {dict(scripts)}",
    )


def _try_all(
    files: st.SearchStrategy[bytes],
    path: Path,
    use: Callable[[Path], None],
    codes: Counter[object],
    count: int,
) -> None:
    @seed(0)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(files)
    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                cli.run(lambda _: use(path), parsed(debug=False))
            codes[0] += 1
        except SystemExit as stop:
            one_line = said.getvalue().count("\n") == 1 and said.getvalue().startswith("error: ")
            codes[stop.code if one_line else f"not one line: {said.getvalue()!r:.200}"] += 1
        except Exception as error:
            codes[f"{type(error).__name__}: {error!s:.80} for {content!r:.120}"] += 1

    attempt()


def _use_table(path: Path) -> None:
    split_rows(read_rows(path), val_fraction=0.5, seed=0)


def _use_text(path: Path) -> None:
    read_indices(path, codebook_size=16)


def _try_scripts(count: int) -> Counter[int]:
    """Exit codes of the real scripts on a few bad files."""
    codes: Counter[int] = Counter()
    for number in range(count):
        Path("bad.csv").write_bytes(b'image_path\n"' + bytes([number % 256]) * number)
        Path("bad.txt").write_bytes(b"0 1\n" + bytes([number % 256]) * number + b"\xff")
        for words in (
            ("train_vqvae.py", "--path_to_data", "bad.csv"),
            ("train.py", "--path_to_data", "bad.txt"),
        ):
            done = subprocess.run(
                [sys.executable, str(ROOT / words[0]), *words[1:]],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            clean = "Traceback" not in done.stderr
            codes[done.returncode if clean else -1] += 1
    return codes
