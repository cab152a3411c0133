"""Tar files, patterns and lists as data sources; every sample once an epoch, from all of them."""

import csv
import io
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from utils.cli import UserError
from utils.data import sources
from utils.data.finding import expand
from utils.data.images import ImageConfig, ImageDataset
from utils.data.sources import BLOCK, Row, archives, epoch_order, read_rows
from utils.distributed import Distributed


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((2, 3), shade, np.uint8)).save(content, "PNG")
    return content.getvalue()


def write(path: Path, files: dict[str, bytes], **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_samples(tmp_path: Path) -> None:
    files = {
        "./a/1.JPG": png(0),
        "./a/1.cls": b"7\n",
        "b/1.5.txt": b"no caption of b/1",
        "b/1.png": png(40),
        "b/1.json": json.dumps({"label": 0, "caption": "ein Fuß", "split": "x"}).encode(),
        "._b": b"of macOS",
        f"{'long' * 50}.png": png(80),
        "c.txt": " größer ".encode(),
        "c.cls": b"",
        "c.png": png(120),
        "c.mask.png": b"?",
    }
    path = write(tmp_path / "data.tar", files, format=tarfile.GNU_FORMAT)
    with pytest.raises(UserError, match=r"row 1: split is empty"):
        read_rows(path)
    files["b/1.json"] = files["b/1.json"].replace(b'"x"', b'""')
    path, stream = write(tmp_path / "b.tar", files), ImageConfig(stream=True)
    dataset = ImageDataset(path, stream, value_range=(0, 120))
    assert [*dataset.rows] == [
        Row("b.tar/a/1.JPG", "7", ""),
        Row("b.tar/b/1.png", "0", "", "", "ein Fuß"),
        Row(f"b.tar/{'long' * 50}.png", "", ""),
        Row("b.tar/c.png", "", "", "", "größer"),
    ]
    (images,) = dataset.batches([torch.arange(4)], torch.device("cpu"))
    assert ((images[:, 0, 0, 0] + 1) * 1.5).round().tolist() == [0, 1, 2, 3]


def test_the_index_is_made_once_and_again_for_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = archives._read_members
    monkeypatch.setattr(archives, "_read_members", lambda path: made.append(1) or make(path))
    path = write(tmp_path / "data.tar", {"1.png": png(1), "1.cls": b"a"})
    for count, label in ((1, "a"), (1, "a"), (2, "bc")):
        if label == "bc":
            write(path, {"1.png": png(1), "1.cls": b"bc", "2.png": b"", "2.cls": b"bc"})
        archives._index.cache_clear()  # as in a new process
        assert {row.label for row in read_rows(path)} == {label}
        assert len(made) == count
    for index in Path("outputs/cache").glob("tar-*.json"):
        index.write_text("{")  # a damaged one is made again
    archives._index.cache_clear()
    assert len(read_rows(path)) == 2
    assert len(made) == 3


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda x: x[:700], r"cannot read .*: unexpected end of data, after sample 0; write or"),
        (lambda x: x[:5000], "cannot read .*: unexpected end of data, after sample 2"),
        (lambda _: b"no archive" * 99, "cannot read .* as an uncompressed tar file"),
        (lambda _: b"", "cannot read .*: empty file"),
    ],
)
def test_damaged_archives(tmp_path: Path, damage: Callable, complaint: str) -> None:
    files = {f"{n}.{x}": png(n) if x == "png" else b"1" for n in range(9) for x in ("cls", "png")}
    path = write(tmp_path / "data.tar", files)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=complaint):
        read_rows(path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"1.cls": b"1"}, "sample 1 needs an image, .*; it has cls"),
        ({"1.png": b"", "1.json": b"[]"}, "sample 1 needs .* JSON an object; it has png, json"),
        ({"1.png": b"", "1.json": b"{"}, "cannot read .*Expecting property name.* after sample 1"),
        ({"1.png": b"", "1.txt": b"\xff"}, "cannot read .*codec can't decode.* after sample 1"),
        ({"1.png": b"", "2.png": b"no"}, "row 1 data.tar/1.png .*empty.*, row 2 data.tar/2.png"),
        ({}, "lists no images"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, files: dict[str, bytes], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ImageDataset(write(tmp_path / "data.tar", files))


def test_an_archive_that_shrank_since_it_was_indexed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.tar", {"1.png": png(1), "2.png": png(2)})
    rows = read_rows(path)
    path.write_bytes(path.read_bytes()[:1600])
    with pytest.raises(UserError, match=r"row 2 data.tar/2.png \(the tar file ends within it\)"):
        ImageDataset(path)
    assert len(rows) == 2


def test_patterns_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8, 12):
        write(tmp_path / f"shards/{number:03}.tar", {f"{number}.png": png(number)})
    more = write(tmp_path / "more/a.tar", {"1.png": png(1)})
    Image.new("L", (3, 2)).save(tmp_path / "more/2.png")
    (tmp_path / "more/data.csv").write_text("image_path,condition_path\n2.png,./2.png\n")
    monkeypatch.chdir(tmp_path)
    for pattern, numbers in {
        "shards/{008..010}.tar": (8, 9, 10),
        "shards/{008,01{1,0}}.tar": (8, 11, 10),
        "shards/0?[89].tar": (8, 9),
        "shards": (8, 9, 10, 11),
        f"{tmp_path}/**/01*.tar": (10, 11),
    }.items():
        rows = read_rows(pattern)
        assert [row.image_path.split("/")[-1] for row in rows] == [f"{n}.png" for n in numbers]
        dataset = ImageDataset(pattern, value_range=(0, 255))
        assert dataset.pixels[:, 0, 0, 0].tolist() == list(numbers)
    rows = read_rows("more/data.csv,shards/008.tar,more/a.tar")
    assert [*rows] == [
        Row("more/2.png", "", "", "more/2.png"),
        Row("shards/008.tar/8.png", "", ""),
        Row("more/a.tar/1.png", "", ""),
    ]
    assert expand("more") == {Path("more"): ""}  # a folder of images, beside which an archive lies
    more.rename("more/a,{1}[2].tar")
    assert len(read_rows("more/a,{1}[2].tar")) == 1
    before = sources.digest("shards/*.tar")
    write(tmp_path / "shards/012.tar", {"12.png": png(12)})
    assert sources.digest("shards/*.tar") != before
    for missing in ("shards/x*.tar", "shards/008.tar,gone.csv", "shards/{007..008}.tar"):
        with pytest.raises(UserError, match=r"no such file or folder: .*; correct"):
            read_rows(missing)


def test_splits_of_file_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001")
    for name in names:
        write(tmp_path / "data" / f"{name}.tar", {"1.png": png(1)})
    assert [(row.image_path[:5], row.split) for row in read_rows(tmp_path)] == [
        ("data/", "train"),
        ("data/", "val"),
    ]
    assert "1 other files are left out" in capsys.readouterr().out
    assert {row.split for row in read_rows(tmp_path / "data" / "t*.tar")} == {""}
    for folder in ("train", "val"):
        write(tmp_path / "folders" / folder / "0.tar", {"1.png": png(1)})
    assert [row.split for row in read_rows(tmp_path / "folders")] == ["train", "val"]
    (tmp_path / "a.csv").write_text("image_path,split\na.png,train\n")
    (tmp_path / "b.csv").write_text("image_path\na.png\n")
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="some rows have a split; give one to all of them"):
        read_rows(tmp_path / "?.csv")


COUNT = 33


def write_source(folder: Path, kind: str, shards: int) -> str:
    """Images of shades 0 to 32 in so many files of a kind, and what --path_to_data is for them."""
    folder.mkdir()
    parts = [range(COUNT)[shard::shards] for shard in range(shards)]
    for number, shades in enumerate(parts):
        names = [f"{shade:02}.png" for shade in shades]
        content = [png(shade) for shade in shades]
        if kind == "tar":
            write(folder / f"{number:02}.tar", dict(zip(names, content, strict=True)))
        elif kind == "parquet":
            table = pa.table({"image": content})
            parquet.write_table(table, folder / f"{number:02}.parquet", row_group_size=4)
        else:
            for name, one in zip(names, content, strict=True):
                (folder / name).write_bytes(one)
            with (folder / f"{number:02}.csv").open("w") as file:
                csv.writer(file).writerows([["image_path"], *([name] for name in names)])
    return str(folder / "*.csv" if kind == "csv" else folder)


def blocks_of(starts: list[int], count: int, order: torch.Tensor) -> list[int]:
    """How many different shards each four in turn of the order of an epoch are of, at most."""
    shards = np.searchsorted(starts, order.numpy(), side="right") - 1
    sizes = np.diff([*starts, count])
    ends, used, here = [], set(), []
    for shard in shards.tolist():
        here.append(shard)
        if len(here) == sum(sizes[list(set(here))]) and len({*here}) >= min(BLOCK, len(starts)):
            ends.append(len({*here}))
            assert not used & {*here}
            used |= {*here}
            here = []
    return [*ends, len({*here})] if here else ends


def test_two_level_order() -> None:
    """Each row once, few shards at a time, as a function of seed and epoch; else as it was."""
    generator = torch.Generator().manual_seed(0)
    for shards in range(1, 12):
        sizes = torch.randint(1, 30, (shards,), generator=generator)
        starts, count = [0, *sizes.cumsum(0)[:-1].tolist()], int(sizes.sum())
        rows = torch.arange(count)
        order = epoch_order(rows, 3, 1, starts)
        assert torch.equal(order.sort().values, rows)
        assert torch.equal(order, epoch_order(rows, 3, 1, starts))
        if shards <= BLOCK:
            assert torch.equal(order, epoch_order(rows, 3, 1))
            continue
        for other in (epoch_order(rows, 3, 2, starts), epoch_order(rows, 4, 1, starts)):
            assert not torch.equal(order, other)
        found = blocks_of(starts, count, order)
        assert (max(found), sum(found)) == (BLOCK, shards)
        some = rows[torch.rand(count, generator=generator) < 0.7]  # those of training
        assert torch.equal(epoch_order(some, 3, 1, starts).sort().values, some)
    firsts = [int(epoch_order(rows, 0, epoch, starts)[0]) for epoch in range(300)]
    assert len({*firsts}) > 60  # of about 160 rows: all shards come first at times


def test_shards_of_each_source(tmp_path: Path) -> None:
    for kind, expected in {"tar": 5, "parquet": 5, "csv": 1, "folder": 1}.items():
        path = write_source(tmp_path / kind, kind, 5)
        dataset = ImageDataset(path, value_range=(0, 255))
        assert dataset.shard_starts("auto") == [0]  # in memory
        sizes = [len(range(COUNT)[shard::5]) for shard in range(5)][:-1]
        starts = [0, *itertools.accumulate(sizes)] if expected == 5 else [0]
        assert dataset.shard_starts("shards") == starts


def test_every_sample_once_an_epoch(tmp_path: Path) -> None:
    """At any number of processes, shards and workers, wherever an epoch is continued."""
    for number, kind in enumerate(("tar", "parquet", "csv", "folder")):
        for shards in range(1, 12) if kind == "tar" else (3,):
            path = write_source(tmp_path / f"{kind}{shards}", kind, shards)
            rows = read_rows(path)
            assert len({row.image_path for row in rows}) == COUNT
        config = ImageConfig(stream=True, num_workers=number)
        dataset = ImageDataset(path, config, value_range=(0, 255))
        order = epoch_order(torch.arange(COUNT), 3, 1)
        (whole,) = dataset.batches([torch.arange(COUNT)], torch.device("cpu"))
        shades = ((whole[:, 0, 0, 0] + 1) * 127.5).round().int()
        assert shades.sort().values.tolist() == list(range(COUNT))
        read = torch.cat(list(dataset.batches(order.split(5), torch.device("cpu"))))
        assert torch.equal(((read[:, 0, 0, 0] + 1) * 127.5).round().int(), shades[order])
    orders = [epoch_order(order, 3, 1, [*range(0, COUNT, 33 // n + 1)]) for n in range(1, 12)]
    several = range(1, 8), range(4), (7, 11), [order, *orders]
    for world, offset, size, order in itertools.product(*several):
        epoch = order.split(size)[offset : COUNT // size]
        groups = [Distributed(rank, world, torch.device("cpu")) for rank in range(world)]
        parts = [[group.shard(batch) for batch in epoch] for group in groups]
        seen = torch.cat([rows for part in parts for rows in part] or [order[:0]])
        expected = order[offset * size : COUNT // size * size]
        assert sorted(seen.tolist()) == sorted(expected.tolist())
        assert len(set(seen.tolist())) == len(seen)
