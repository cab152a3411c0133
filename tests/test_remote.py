"""Data at URLs: downloaded once for each state of them, by any processes, within a limit."""

import fcntl
import functools
import http.server
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet

from tests.conftest import TINY_GPT, write_images
from tests.test_archives import png, write
from tests.test_transformer_generation import CODES, call, write_tokenizer
from utils import addresses
from utils.cli import UserError
from utils.data import sources
from utils.data.images import ImageConfig, ImageDataset
from utils.data.indices import IndicesMeta, read_indices, write_indices
from utils.data.remote import fetch
from utils.data.sources import Row, read_rows


@pytest.fixture(autouse=True)
def memory(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """A file system in memory, and a cache in the current folder; nothing is fetched yet."""
    system = fsspec.filesystem("memory")
    addresses.fetch_files.cache_clear()
    yield system
    system.rm("/", recursive=True)
    addresses.fetch_files.cache_clear()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are downloaded."""
    names, get = [], addresses._download

    def download(system: object, staging: Path, file: tuple[str, dict]) -> None:
        if not (staging / file[0]).exists():
            names.append(file[0])
        get(system, staging, file)

    monkeypatch.setattr(addresses, "_download", download)
    return names


def put(system: MemoryFileSystem, local: Path, remote: str) -> None:
    for path in sorted(local.rglob("*")):
        if path.is_file():
            system.pipe(f"{remote}/{path.relative_to(local)}", path.read_bytes())


def again(address: str) -> Path:
    """Fetch as a new process would."""
    addresses.fetch_files.cache_clear()
    return Path(fetch(address))


def shades(dataset: ImageDataset) -> list[int]:
    (images,) = dataset.batches([torch.arange(len(dataset))], torch.device("cpu"))
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_patterns_lists_and_folders(memory: MemoryFileSystem, downloads: list[str]) -> None:
    for number in range(8, 12):
        write(Path(f"local/{number:03}.tar"), {f"{number}.png": png(number)})
    parquet.write_table(pa.table({"image": [png(1), png(2)]}), "local.parquet")
    put(memory, Path("local"), "/bucket/shards")
    memory.pipe("/bucket/more/train-0.parquet", Path("local.parquet").read_bytes())
    memory.pipe("/bucket/more/README.md", b"?")
    for pattern, expected in {
        "memory://bucket/shards/{008..010}.tar": [8, 9, 10],
        "memory://bucket/shards/{008,01{1,0}}.tar": [8, 11, 10],
        "memory://bucket/shards/0?[89].tar": [8, 9],
        "memory://bucket/shards": [8, 9, 10, 11],
        "memory://bucket/shards/": [8, 9, 10, 11],
        "memory://bucket/shards/009.tar": [9],
        "memory://bucket/more": [1, 2],
        "memory://bucket/more/*.parquet,memory://bucket/shards/011.tar": [1, 2, 11],
        "memory://bucket/more/train-0.parquet,local/008.tar": [1, 2, 8],
    }.items():
        dataset = ImageDataset(pattern, value_range=(0, 255))
        assert shades(dataset) == expected, pattern
        streamed = ImageDataset(pattern, ImageConfig(stream=True), value_range=(0, 255))
        assert shades(streamed) == expected
    local = read_rows("local")
    assert ImageDataset("memory://bucket/shards").rows == local
    assert sources.digest(fetch("memory://bucket/shards")) == sources.digest("local")
    count = len(downloads)
    assert again("memory://bucket/shards").is_dir()
    assert len(downloads) == count
    for missing in ("memory://bucket/shards/{008..012}.tar", "memory://bucket/x/*.tar"):
        with pytest.raises(UserError, match=r"cannot fetch memory://bucket/(shards/008|x/\*)"):
            fetch(missing)


def test_a_csv_with_images_beside_it(memory: MemoryFileSystem, downloads: list[str]) -> None:
    local = write_images(Path("local"), 5)
    put(memory, Path("local"), "/bucket/data")
    memory.pipe("/bucket/data/other.png", b"not in the CSV")
    remote = ImageDataset("memory://bucket/data/data.csv")
    assert torch.equal(remote.pixels, ImageDataset(local).pixels)
    assert remote.rows == read_rows(local)
    assert sources.digest(fetch("memory://bucket/data/data.csv")) == sources.digest(local)
    assert "other.png" not in downloads
    memory.pipe("/bucket/data/bad.csv", b"image_path\n../../../secret.png\n")
    memory.pipe("/secret.png", b"?")
    with pytest.raises(UserError, match=r"leads out of its folder|no such file.*/secret\.png"):
        fetch("memory://bucket/data/bad.csv")
    memory.pipe("/bucket/data/bad.csv", b"image_path\ngone.png\n")
    with pytest.raises(UserError, match=r"cannot fetch memory://bucket/data/bad\.csv .*gone"):
        again("memory://bucket/data/bad.csv")


def test_a_changed_file_is_downloaded_again(memory: MemoryFileSystem, downloads: list[str]) -> None:
    memory.pipe({"/bucket/a/1.txt": b"1", "/bucket/a/2.txt": b"2"})
    first = again("memory://bucket/a")
    assert again("memory://bucket/a") == first
    memory.pipe("/bucket/a/2.txt", b"3")
    second = again("memory://bucket/a")
    assert [(second / name).read_text() for name in ("1.txt", "2.txt")] == ["1", "3"]
    assert (first / "2.txt").read_text() == "2"  # another process may be reading it
    assert sorted(downloads) == ["a/1.txt", "a/1.txt", "a/2.txt", "a/2.txt"]


def test_an_interrupted_download_continues(
    memory: MemoryFileSystem, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({f"/bucket/a/{number}.txt": b"%d" % number for number in range(5)})
    real = MemoryFileSystem.get_file

    def get_file(self: MemoryFileSystem, path: str, target: str, **options: object) -> None:
        if path.endswith("3.txt"):
            Path(target).write_bytes(b"")  # and then the connection ends, without an error
            return
        real(self, path, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with pytest.raises(UserError, match=r"cannot fetch .*3\.txt ended after 0 of 1 bytes"):
        again("memory://bucket/a")
    (cache,) = Path("outputs/cache/remote").glob("*.tmp")
    assert not (cache / "a" / "3.txt").exists()
    monkeypatch.setattr(MemoryFileSystem, "get_file", real)
    before = len(downloads)
    folder = again("memory://bucket/a")
    assert [(folder / f"{number}.txt").read_text() for number in range(5)] == [*"01234"]
    assert "3.txt" in {Path(x).name for x in downloads[before:]}
    assert len({*downloads[before:]} & {*downloads[:before]}) == 1
    assert not cache.exists()


def test_the_least_recently_used_is_evicted(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOTE_CACHE", "elsewhere")
    monkeypatch.setenv("REMOTE_CACHE_GIB", str(2500 / 2**30))
    held: list[int] = []
    real = fcntl.flock
    monkeypatch.setattr(
        fcntl, "flock", lambda x, y: (y == fcntl.LOCK_SH and held.append(x)) or real(x, y)
    )

    def end_of_process() -> None:
        while held:
            os.close(held.pop())

    def size_1000(name: str) -> Path:
        memory.pipe(f"/bucket/{name}", name.encode() * 1000)
        return again(f"memory://bucket/{name}")

    a, b = size_1000("a"), size_1000("b")
    end_of_process()
    os.utime(a.parent, (1, 1))
    os.utime(b.parent, (0, 0))
    c = size_1000("c")
    assert [x.exists() for x in (a, b, c)] == [True, False, True]
    assert c.parents[1] == Path("elsewhere").absolute()
    again("memory://bucket/a")  # which this process uses from now on, as c
    with pytest.raises(UserError, match=r"memory://bucket/d takes .* GiB, but .* in use; raise"):
        size_1000("d")
    end_of_process()
    assert size_1000("d").read_text() == "d" * 1000
    memory.pipe("/bucket/large", bytes(2600))
    with pytest.raises(UserError, match="REMOTE_CACHE_GIB, or name a larger disk"):
        fetch("memory://bucket/large")
    assert len([*Path("elsewhere").glob("*/*")]) == 2  # nothing was removed for it


class Handler(http.server.SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        self.requests.append(f"{self.command} {self.path}")


@pytest.fixture
def server(own_folder: Path) -> Iterator[str]:
    """The address of a server of the folder www."""
    Path("www").mkdir()
    Handler.requests.clear()
    handler = functools.partial(Handler, directory="www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def in_process(url: str, results: object) -> None:
    results.put((fetch(url), os.getpid()))


def test_http_by_several_processes_at_once(server: str) -> None:
    for number in range(3):
        write(Path(f"www/shards/{number:03}.tar"), {f"{number}.png": png(number)})
    url = f"{server}/shards/{{000..002}}.tar"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=in_process, args=(url, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60)[0] for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert sorted(x for x in Handler.requests if x.startswith("GET")) == [
        f"GET /shards/{number:03}.tar" for number in range(3)
    ]
    assert shades(ImageDataset(url, value_range=(0, 255))) == [0, 1, 2]
    signed = f"{server}/shards/001.tar?signature=secret"
    assert shades(ImageDataset(signed, value_range=(0, 255))) == [1]
    with pytest.raises(
        UserError, match=r"cannot fetch http://.*/gone\.tar\?sig\S+ \(no such file.*; check the"
    ) as e:
        fetch(f"{server}/gone.tar?signature=secret")
    assert "secret" not in str(e.value)


def test_what_cannot_be_reached_has_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot fetch http://127\.0\.0\.1:9/x\.tar \(.*; check"):
        fetch("http://127.0.0.1:9/x.tar")
    with pytest.raises(UserError, match=r"cannot fetch s3://bucket/x\.tar .*; pip install"):
        fetch("s3://bucket/x.tar")
    with pytest.raises(UserError, match="cannot fetch nonsense://host/x"):
        fetch("nonsense://name:secret@host/x")


def test_all_stages_read_urls(memory: MemoryFileSystem, own_folder: Path) -> None:
    torch.manual_seed(0)
    write_tokenizer(own_folder / "tokenizer")
    put(memory, write_images(own_folder / "data").parent, "/bucket/data")
    flags = ("--device", "cpu", "--num_workers", 0)
    data = ("--path_to_data", "memory://bucket/data/data.csv", *flags)
    call("quantize_dataset", "--model_dir", "tokenizer", *data, "--output_dir", "remote")
    local = ("--path_to_data", "data/data.csv", *flags)
    call("quantize_dataset", "--model_dir", "tokenizer", *local, "--output_dir", "local")
    for name in ("indices.npy", "manifest.csv"):
        assert Path("remote", name).read_bytes() == Path("local", name).read_bytes()
    call("evaluate", "reconstructions", "--model_dir", "tokenizer", *data, "--output_dir", "errors")
    put(memory, Path("remote"), "/bucket/indices")
    training = (*TINY_GPT, "--device", "cpu", "--max_steps", 2, "--output_dir", "gpt")
    call("train", "--path_to_data", "memory://bucket/indices", *training)
    tiny = ("--channels", 8, "--codebook_size", CODES, "--codebook_dim", 4, "--max_steps", 2)
    call("train_vqvae", *data, *tiny, "--batch_size", 4, "--output_dir", "tokenizer2")
    assert json.loads(Path("errors/reconstructions.json").read_text())["metrics"]


def test_shards_of_indices_at_a_url(memory: MemoryFileSystem) -> None:
    grids = torch.arange(42).reshape(7, 2, 3)
    rows = [Row(f"{number}.png", "", "") for number in range(7)]
    folder = write_indices("indices", grids, rows, IndicesMeta(300, (2, 3)), shard_bytes=24)
    put(memory, folder, "/bucket/indices")
    found = read_indices(addresses.fetch("memory://bucket/indices"))
    assert torch.equal(found.grids[:].long(), grids)
