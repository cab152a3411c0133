"""Indices in shards: read without loading them, written by several processes, continued."""

import itertools
import json
import math
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from quantize_dataset import make_shards
from tests.conftest import TINY_GPT, write_images, write_shards
from tests.forks import Forked
from tests.test_transformer_generation import CODES, call, write_tokenizer
from utils.cli import UserError
from utils.data import indices, sources
from utils.data.index_dataset import IndexDataset
from utils.data.indices import IndicesMeta, read_indices, shard_rows
from utils.data.sources import Row, ShardedArray
from utils.distributed import ALONE, Distributed
from utils.files import CHECKSUMS, sha256
from utils.training import loop
from utils.training.checkpoint import find_checkpoint

META = IndicesMeta(300, (2, 3))
SIZES = {"indices": 300, "crops": 300}


def write_parts(folder: Path, whole: np.ndarray, shards: int) -> ShardedArray:
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(whole, shards)):
        np.save(folder / f"indices-{number:05}.npy", part)
    return ShardedArray(indices.shards_of(folder, "indices"))


def test_rows_of_shards_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.random.default_rng(0).integers(0, 60_000, (23, 4, 2, 3), np.uint16)
    monkeypatch.setattr(sources, "MAPPED", 2)  # more shards than are open at a time
    for shards in (1, 3, 11, 23):
        array, tensor = write_parts(tmp_path / str(shards), whole, shards), torch.from_numpy(whole)
        assert (len(array), array.shape) == (23, whole.shape)
        rows, others = torch.randint(23, (40,)), torch.randint(4, (40,))
        keys = rows, rows.numpy(), rows[:0], rows[:1], slice(None), slice(5, 12), slice(20, 99, 2)
        for key in keys:
            assert torch.equal(array[key].int(), tensor[key].int())
        assert torch.equal(array[rows, others].int(), tensor[rows, others].int())
        assert torch.equal(array[22].int(), tensor[22].int())
        assert [len(part) for part in array.parts()] == np.diff([*array.starts, 23]).tolist()
        for wrong in (23, torch.tensor([3, 23]), torch.tensor([-1])):
            with pytest.raises(IndexError):
                array[wrong]


def test_shards_are_not_loaded(tmp_path: Path) -> None:
    """The whole is 32 MB; reading the folder, checks included, and some rows takes 2 MB."""
    grids = torch.arange(1 << 14).reshape(-1, 1, 1).expand(-1, 32, 32) % 300
    rows = [Row(f"{number}.png", "a", "train") for number in range(len(grids))]
    meta = IndicesMeta(300, (32, 32))
    folder = write_shards(tmp_path / "indices", grids, rows, meta, 512)
    assert len(indices.shards_of(folder, "indices")) == 32
    tracemalloc.start()
    array = indices.open_grids(folder, "indices", meta, len(rows))
    assert array[torch.tensor([0, 9999, 5])][:, 0, 0].tolist() == [0, 9999 % 300, 5]
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_damage_in_one_shard_is_named(tmp_path: Path) -> None:
    grids = torch.arange(42).reshape(7, 2, 3)
    rows = [Row(f"{number}.png", "", "") for number in range(7)]
    folder = write_shards(tmp_path / "indices", grids, rows, META, 2)
    second = folder / "indices-00001.npy"
    good = np.load(second)
    np.save(second, good + np.uint16(280))
    with pytest.raises(UserError, match=r"indices-00001\.npy is damaged: its SHA-256"):
        read_indices(folder)
    (folder / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"indices-00001\.npy holds the index 303"):
        read_indices(folder)
    second.unlink()
    with pytest.raises(UserError, match="has 7 rows for 5 grids"):
        read_indices(folder)
    np.save(second, good)
    np.save(folder / "crops-00000.npy", np.zeros((6, 2, 2, 3), np.uint16))
    np.save(folder / "crops-00001.npy", np.zeros((2, 2, 2, 3), np.uint16))
    options = {"latent_dim": None, "val_fraction": 0.5, "seed": 0}
    with pytest.raises(UserError, match="has 7 rows for 8 grids in crops"):
        IndexDataset(folder, None, **options)


def in_team(world_size: int, work: Callable[[Distributed], Path]) -> Path:
    """What each of several processes would do, in threads; what the first returns."""
    barrier, box = threading.Barrier(world_size, timeout=60), {}

    class Member(Distributed):
        def on_main(self, make: Callable[[], Any]) -> Any:
            if self.is_main:
                box["value"] = make()
            barrier.wait()
            value = box["value"]
            barrier.wait()
            return value

        def all_gather(self, value: Any) -> list[Any]:
            barrier.wait()
            return [value]

    members = [Member(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return next(iter([*pool.map(work, members)]))


def arrays_of(rows: Tensor) -> Mapping[str, Tensor]:
    grids = (rows[:, None, None] * 6 + torch.arange(6).view(2, 3)) % 300
    return {"indices": grids, "crops": torch.stack([grids, grids.flip(2)], 1)}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def finish(folder: Path, staging: Path, count: int) -> dict[str, bytes]:
    rows = [Row(f"{number}.png", "", "train") for number in range(count)]
    with indices.new_folder(folder, rows, META, staging=staging):
        pass
    sums = json.loads((folder / CHECKSUMS).read_text())
    assert sums == {path.name: sha256(path) for path in folder.iterdir() if path.name in sums}
    assert {path.name for path in folder.iterdir()} == {*sums, CHECKSUMS}
    return content(folder)


@pytest.mark.parametrize("world_size", range(1, 8))
def test_names_and_content_are_those_of_one_process(tmp_path: Path, world_size: int) -> None:
    for count, per_shard in itertools.product((world_size, 23, 40), (3, 23, 100)):
        parts, folder = shard_rows(count, META, per_shard), tmp_path / f"{count}-{per_shard}"
        work = partial(make_shards, folder, parts, SIZES, arrays_of, "this")
        written = finish(folder, in_team(world_size, work), count)
        whole = make_shards(tmp_path / "one", parts, SIZES, arrays_of, str(folder), ALONE)
        assert written == finish(tmp_path / "one", whole, count)
        assert len(read_indices(folder).rows) == count
        numbered = [f"indices-{number:05}.npy" for number in range(len(parts))]
        expected = numbered if len(parts) > 1 else ["indices.npy"]
        assert [x for x in written if x.startswith("indices")] == expected


def test_an_interrupted_command_continues(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts, made = shard_rows(25, META, 5), []

    def make(rows: Tensor) -> Mapping[str, Tensor]:
        made.append(int(rows[0]) // 5)
        if len(made) == 4:
            raise KeyboardInterrupt
        return arrays_of(rows)

    folder = tmp_path / "indices"
    with pytest.raises(KeyboardInterrupt):
        make_shards(folder, parts, SIZES, make, "this", ALONE)
    staging = make_shards(folder, parts, SIZES, make, "this", ALONE)
    assert made == [0, 1, 2, 3, 3, 4]
    assert "3 of 5 shards were finished before" in capsys.readouterr().out
    damaged = staging / "crops-00002.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (staging / "indices-00004.npy.sha256").unlink()  # as after a kill while it was written
    make_shards(folder, parts, SIZES, make, "this", ALONE)
    assert made[6:] == [2, 4]
    make_shards(folder, parts, SIZES, make, "another tokenizer", ALONE)
    assert made[8:] == [0, 1, 2, 3, 4]
    whole = make_shards(tmp_path / "whole", parts, SIZES, arrays_of, "this", ALONE)
    assert finish(folder, staging, 25) == finish(tmp_path / "whole", whole, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["indices", "whole"]


def test_what_an_interrupted_command_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    """A half written indices.txt got a checksum; and a failed rename discarded all shards."""
    folder, parts = tmp_path / "indices", shard_rows(9, META, 3)
    staging = make_shards(folder, parts, SIZES, arrays_of, "this", ALONE)
    (staging / "indices.txt").write_text("1 2")
    with (
        patch.object(Path, "rename", side_effect=OSError("busy")),
        pytest.raises(UserError, match="cannot write"),
    ):
        finish(folder, staging, 9)
    made: list[int] = []

    def make(rows: Tensor) -> Mapping[str, Tensor]:
        made.append(int(rows[0]))
        return arrays_of(rows)

    assert make_shards(folder, parts, SIZES, make, "this", ALONE) == staging
    assert made == []
    finish(folder, staging, 9)
    assert not (folder / "indices.txt").exists()


def test_a_file_that_changes_during_a_training_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAPPED", 1)
    array = write_parts(tmp_path / "parts", np.arange(12).reshape(6, 2), 3)
    assert array[torch.arange(6)].tolist() == np.arange(12).reshape(6, 2).tolist()
    np.save(tmp_path / "parts" / "indices-00001.npy", np.zeros((2, 2), np.int64))
    with pytest.raises(UserError, match=r"indices-00001\.npy has changed"):
        array[torch.arange(6)]


def test_shards_are_ordered_by_number(tmp_path: Path) -> None:
    for number in (99_999, 100_000, 2):
        (tmp_path / f"indices-{number:05}.npy").touch()
    found = [path.stem[8:] for path in indices.shards_of(tmp_path, "indices")]
    assert found == ["00002", "99999", "100000"]


def test_a_killed_quantization_continues(own_folder: Path) -> None:
    torch.manual_seed(0)
    write_tokenizer(own_folder / "tokenizer")
    path = write_images(own_folder / "data")
    names = [f"{number % 12}.png" for number in range(240)]
    path.write_text("".join(f"{name}\n" for name in ["image_path", *names]))
    words = ["--model_dir", "tokenizer", "--path_to_data", "data/data.csv", "--device", "cpu"]
    words += ["--num_workers", "0", "--batch_size", "2", "--images_per_shard", "24", "--stream"]
    repository = Path(__file__).parents[1]
    command = [repository / "quantize_dataset.py", *words, "--output_dir", "killed"]
    with Forked(*command) as process:
        deadline = time.monotonic() + 120
        while len([*Path("killed.tmp").glob("*.sha256")]) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    finished = [path.stem for path in Path("killed.tmp").glob("*.npy.sha256")]
    assert 2 <= len(finished) < 10
    times = {name: Path("killed.tmp", name).stat().st_mtime_ns for name in finished}
    call("quantize_dataset", *words, "--output_dir", "killed")
    assert {name: Path("killed", name).stat().st_mtime_ns for name in times} == times
    call("quantize_dataset", *words, "--output_dir", "whole")
    assert content(Path("killed")) == content(Path("whole"))
    assert len(content(Path("whole"))) == 10
    assert not Path("killed.tmp").exists()
    found = read_indices("killed")
    assert len(found.grids) == 240
    assert found.grids[:].max() < CODES


def test_a_training_on_shards_resumes_exactly(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--shuffle shards orders indices of several files in two levels; it is stored."""
    grids = torch.randint(16, (60, 2, 3), generator=torch.Generator().manual_seed(0))
    rows = [Row(f"{number}.png", "", "val" if number % 6 == 0 else "train") for number in range(60)]
    write_shards("shards", grids, rows, IndicesMeta(16, (2, 3)), 10)
    indices.write_indices("whole", grids, rows, IndicesMeta(16, (2, 3)))
    real, stop_after = loop.batches, math.inf

    def batches(state: loop.TrainState, *arguments: Any) -> Iterator[Any]:
        for step, (numbers, batch) in enumerate(real(state, *arguments), 1):
            seen.append(numbers.tolist())
            yield numbers, batch
            if step == stop_after:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "batches", batches)
    training = ("train", *TINY_GPT, "--device", "cpu", "--max_epochs", 2, "--batch_size", 7)

    def rows_of(*words: object) -> list[list[int]]:
        seen.clear()
        with suppress(SystemExit):
            call(*training, *words)
        return [*seen]

    seen: list[list[int]] = []
    two_levels = ("--shuffle", "shards")
    in_shards = rows_of("--path_to_data", "shards", "--output_dir", "a", *two_levels)
    assert len(in_shards) == 14
    assert len({row // 10 for batch in in_shards[:4] for row in batch}) == 4
    whole = rows_of("--path_to_data", "whole", "--output_dir", "b")
    assert rows_of("--path_to_data", "shards", "--output_dir", "c") == whole
    assert whole != in_shards
    stop_after = 4
    first = rows_of("--path_to_data", "shards", "--output_dir", "d", *two_levels)
    stop_after = math.inf
    assert first + rows_of("--resume", "d") == in_shards
    settings = json.loads((find_checkpoint("d", "") / "training.json").read_text())["settings"]
    assert settings["shuffle"] == "shards"
