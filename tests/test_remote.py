"""Data at URLs: copied once, completed after an interruption, brought up to date; then as local."""

import io
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import run_script
from utils import addresses
from utils.cli import UserError
from utils.data import sources
from utils.data.images import ImageDataset
from utils.data.sources import split_rows

NAMES = [f"images/{'ab'[n % 2]}/{n:02}.png" for n in range(20)]


def png(seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a CSV, its images, and two tar files."""
    home = tmp_path / "original"
    for number, name in enumerate(NAMES):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(png(number))
    lines = [f"{name},{'ab'[number % 2]}\n" for number, name in enumerate(NAMES)]
    (home / "data.csv").write_text(f"image_path,label\n{''.join(lines)}")
    (home / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(home / "shards" / f"{shard}.tar", "w") as archive:
            for name in NAMES[shard::2]:
                archive.add(home / name, Path(name).name)
    return home


@pytest.fixture
def bucket(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same files in a file system in memory, which counts what is downloaded."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()  # of what other tests left: a folder is put into one of the same name
    memory.pseudo_dirs[:] = [""]
    memory.put(str(here), "/bucket", recursive=True)
    get_file = type(memory).get_file
    memory.downloaded = Counter()

    def count(self: Any, name: str, *arguments: Any, **options: Any) -> None:
        memory.downloaded[name.removeprefix("/bucket/")] += 1
        get_file(self, name, *arguments, **options)

    monkeypatch.setattr(type(memory), "get_file", count)
    new_process()
    yield memory
    memory.rm("/bucket", recursive=True)


def new_process() -> None:
    """Forget what this process knows of copies."""
    addresses.download.cache_clear()
    addresses.Mirror.cache_clear()
    addresses._originals.clear()


@pytest.mark.parametrize("name", ["data.csv", "images", "shards", "shards/{0,1}.tar", "shards/*"])
def test_as_if_it_were_local(here: Path, bucket: Any, name: str) -> None:
    local, remote = ImageDataset(f"{here}/{name}"), ImageDataset(f"memory://bucket/{name}")
    assert len(local) == 20
    assert [*remote.rows] == [*local.rows]
    assert torch.equal(remote.pixels, local.pixels)
    assert sources.digest(remote.path) == sources.digest(local.path)
    splits = [split_rows(x.rows, val_fraction=0.3, seed=0) for x in (local, remote)]
    assert all(map(torch.equal, *splits))


def test_lists_and_splits(bucket: Any) -> None:
    bucket.mv("/bucket/shards/0.tar", "/bucket/shards/train-0.tar")
    bucket.mv("/bucket/shards/1.tar", "/bucket/shards/val-0.tar")
    for path in ("memory://bucket/shards/*", "memory://bucket/shards"):
        rows = sources.read_rows(path)
        assert Counter(row.split for row in rows) == {"train": 10, "val": 10}
    path = "memory://bucket/data.csv,memory://bucket/shards/train-0.tar"
    assert len(sources.read_rows(path)) == 30


@pytest.mark.parametrize("path", ["memory://bucket/data.csv", "memory://bucket/images"])
def test_nothing_is_downloaded_twice(bucket: Any, path: str) -> None:
    sources.read_rows(path)
    assert set(bucket.downloaded.values()) == {1}
    assert {*NAMES} <= {*bucket.downloaded}
    bucket.downloaded.clear()
    new_process()
    ImageDataset(path)
    assert not bucket.downloaded


def test_what_changed_is_downloaded_anew(here: Path, bucket: Any) -> None:
    first = ImageDataset("memory://bucket/images").pixels
    bucket.pipe(f"/bucket/{NAMES[3]}", png(100))
    bucket.rm(f"/bucket/{NAMES[0]}")
    (here / NAMES[3]).write_bytes(png(100))
    (here / NAMES[0]).unlink()
    bucket.downloaded.clear()
    new_process()
    second = ImageDataset("memory://bucket/images")
    assert sum(bucket.downloaded.values()) == 1
    assert len(second) == 19
    assert torch.equal(second.pixels, ImageDataset(here / "images").pixels)
    assert len(first) == 20


def test_an_interrupted_download_continues(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    get_file, broken = type(bucket).get_file, NAMES[10:]

    def fail(self: Any, name: str, *arguments: Any) -> None:
        get_file(self, name, *arguments)
        if name.removeprefix("/bucket/") in broken:
            raise ConnectionError("reset by peer")  # after a part of the file, so to say

    monkeypatch.setattr(addresses, "THREADS", 1)
    monkeypatch.setattr(type(bucket), "get_file", fail)
    with pytest.raises(UserError, match=r"cannot fetch .*reset by peer"):
        sources.read_rows("memory://bucket/data.csv")
    for thread in threading.enumerate():
        if "(worker)" in thread.name:  # a real process would have ended
            thread.join()
    broken.clear()
    bucket.downloaded.clear()
    new_process()
    assert len(ImageDataset("memory://bucket/data.csv")) == 20
    assert {*bucket.downloaded} == {*NAMES[10:]}
    assert not [*addresses.REMOTE.glob("*/staging/*")]


def test_a_file_that_is_missing_is_named(bucket: Any) -> None:
    bucket.rm(f"/bucket/{NAMES[5]}")
    with pytest.raises(UserError, match=f"1 of 20 files in .* do not exist.*{NAMES[5]}"):
        sources.read_rows("memory://bucket/data.csv")
    bucket.pipe("/bucket/data.csv", b"image_path\n../secret.png\n/etc/passwd\na/../../x.png\n")
    new_process()
    bucket.downloaded.clear()
    with pytest.raises(UserError, match=r"2 of 3 files .* do not exist"):
        sources.read_rows("memory://bucket/data.csv")
    assert not {*bucket.downloaded} & {"/etc/passwd", "etc/passwd"}


@pytest.mark.parametrize("name", ["none.csv", "none", "shards/*.zip"])
def test_nothing_there(bucket: Any, name: str) -> None:
    with pytest.raises(UserError, match=rf"cannot fetch memory://bucket/{name[:4]}") as caught:
        sources.read_rows(f"memory://bucket/{name}")
    assert "\n" not in str(caught.value)


def test_processes_share_a_copy(bucket: Any) -> None:
    def fetch(_: int) -> list[Path]:
        url = "memory://bucket/shards"
        return addresses.download.__wrapped__((url,))[url]

    with ThreadPoolExecutor(4) as pool:
        assert len({str(x) for x in pool.map(fetch, range(4))}) == 1
    assert bucket.downloaded == {"shards/0.tar": 1, "shards/1.tar": 1}


def test_no_room_is_said_before_the_download(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=10)
    monkeypatch.setattr(addresses.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"bytes, but room for 9; clear outputs/cache/remote"):
        addresses.fetch("memory://bucket/data.csv")
    assert not bucket.downloaded


def test_files_stay_in_the_cache(bucket: Any, own_folder: Path) -> None:
    """A bucket may have any names."""
    bucket.pipe({"/bucket/evil/../../../../x.png": png(0), "/bucket/evil//etc/y.png": png(1)})
    with pytest.raises(UserError, match="outside of its root"):
        sources.read_rows("memory://bucket/evil")
    assert not [*own_folder.rglob("x.png")]
    bucket.rm("/bucket/evil/../../../../x.png")
    assert len(sources.read_rows("memory://bucket/evil")) == 1


def test_a_csv_and_its_folder_share_the_copies(bucket: Any) -> None:
    for path in ("memory://bucket/images", "memory://bucket/data.csv", "memory://bucket/images"):
        assert len(ImageDataset(path)) == 20
        new_process()
    assert set(bucket.downloaded.values()) == {1}


@pytest.mark.parametrize("url", ["https://me:hush@host/a.csv", "https://host/a.csv?token=hush"])
def test_passwords_are_refused(url: str) -> None:
    """They would be in the settings of the run, in the cache and in MLflow."""
    with pytest.raises(UserError, match="logs would show its password") as caught:
        sources.read_rows(url)
    assert "hush" not in str(caught.value)


def test_a_row_that_names_a_folder_harms_nothing(bucket: Any) -> None:
    """fsspec makes a folder of it where a file should be written."""
    bucket.pipe("/bucket/bad.csv", b"image_path\nimages\n")
    with pytest.raises(UserError, match="images"):
        sources.read_rows("memory://bucket/bad.csv")
    new_process()
    assert len(sources.read_rows("memory://bucket/data.csv")) == 20


@pytest.fixture
def server(here: Path) -> Iterator[str]:
    handler: Callable[..., Any] = partial(SimpleHTTPRequestHandler, directory=str(here))
    SimpleHTTPRequestHandler.log_message = lambda *_: None  # type: ignore[method-assign]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_stages_from_a_web_server(here: Path, server: str) -> None:
    flags = "--preset vqvae-small --codebook_size 8 --max_steps 2 --batch_size 4"
    data = "--path_to_data", f"{server}/data.csv"
    run_script("train_vqvae.py", *data, *flags.split(), "--output_dir", "tokenizer")
    run_script("quantize_dataset.py", *data, "--model_dir", "tokenizer", "--output_dir", "indices")
    run_script("evaluate.py", "reconstructions", *data, "--model_dir", "tokenizer")
    local = ("--path_to_data", here / "data.csv", "--output_dir", "others")
    run_script("quantize_dataset.py", "--model_dir", "tokenizer", *local)
    for name in ("indices.npy", "manifest.csv"):
        assert Path("indices", name).read_bytes() == Path("others", name).read_bytes()
    (here / "a%41 #b").mkdir()
    shutil.copy(here / NAMES[0], here / "a%41 #b" / "c?d.png")
    (here / "odd.csv").write_text("image_path\na%41 #b/c?d.png\n")
    assert torch.equal(
        ImageDataset(f"{server}/odd.csv").pixels, ImageDataset(here / NAMES[0][:8]).pixels[:1]
    )
    copies = {addresses.fetch(f"{server}/{NAMES[1]}?id={number}") for number in (1, 2)}
    assert len(copies) == 2  # a server may answer by the query
    assert all(copy.suffix == ".png" and copy.read_bytes() == png(1) for copy in copies)
    with pytest.raises(UserError, match="a web page; give the URL of a file"):
        sources.read_rows(server)
    with pytest.raises(UserError, match=r"cannot fetch http://127\.0\.0\.1:1/x\.tar"):
        sources.read_rows("http://127.0.0.1:1/x.tar")
