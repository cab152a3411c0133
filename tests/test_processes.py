"""The stages without training in several processes: the same output as one process gives."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import run_script, write_images
from tests.forks import run_forked
from tests.test_transformer_generation import CODES, GRID, write_gpt, write_tokenizer
from utils.cli import UserError
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import Vocabulary
from utils.distributed import Distributed
from utils.evaluation import features

# Imports everything once, then forks the ranks, as torchrun would start them.
FORK = """
import importlib, json, os, sys
from torch.distributed import TCPStore
from utils import cli, distributed
from utils.evaluation import features
commands, children = json.loads(sys.argv[1]), []
modules = {name: importlib.import_module(name) for name, *_ in commands}
features.TRAINING_IMAGES = 200
os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
# As torchrun's agent does, this process holds the stores, which outlive each rank.
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
for rank in range(3):
    if not (child := os.fork()):
        os.environ["RANK"] = str(rank)
        for number, sys.argv in enumerate(commands, int(sys.argv[2])):
            os.environ["MASTER_PORT"] = str(number)
            module = modules[sys.argv[0]]
            cli.run(module.main, module.make_parser(), distributed.is_first_to_fail)
    children.append(child)
first = int(sys.argv[2])
ports = range(first, first + len(commands))
stores = [TCPStore("127.0.0.1", x, is_master=True, wait_for_workers=False) for x in ports]
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""
FLAGS = ("--device", "cpu", "--batch_size", "2", "--num_workers", "0")


Outcome = tuple[Path, subprocess.CompletedProcess]


def stages(folder: str) -> list[list[str]]:
    """A call of each stage, which writes below a folder."""
    data = ("--path_to_data", "data/data.csv", "--model_dir", "tokenizer", *FLAGS)
    sampling = ("--num_images", "7", "--candidates", "2", "--model_path", "gpt", *FLAGS[:4])
    grids = ("--indexes_path", "samples", "--model_dir", "tokenizer", *FLAGS)
    many = ("--path_to_data", "data/many.csv", "--batch_size", "32", "--images_per_shard", "300")
    calls = {
        "indices": ("quantize_dataset", *data, "--crops", "2", "--flip"),
        "shards": ("quantize_dataset", *data, *many),
        "samples": ("transformer_generation", *sampling),
        "images": ("vqvae.images_from_indexes", *grids),
        "errors": ("evaluate", "reconstructions", *data, "--features", "classifier"),
        "bits": ("evaluate", "likelihood", *data, "--model_path", "gpt"),
    }
    return [[*words, "--output_dir", f"{folder}/{name}"] for name, words in calls.items()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """What three processes did after one had: each stage, and then one with a bad image.

    Of a tokenizer and a GPT that nobody trained.
    """
    folder, before = tmp_path_factory.mktemp("processes"), Path.cwd()
    os.chdir(folder)
    torch.manual_seed(0)
    sha256 = write_tokenizer(folder / "tokenizer")
    write_gpt("gpt", Vocabulary(CODES, GRID, sha256, class_names=("a", "b")))
    rows, meta = [Row("x.png", "", "")] * 7, IndicesMeta(CODES, GRID, tokenizer_sha256=sha256)
    write_indices("samples", torch.randint(CODES, (7, *GRID)), rows, meta)
    for data in ("data", "bad"):
        write_images(folder / data)
    names = [f"{number % 12}.png" for number in range(2000)]
    (folder / "data" / "many.csv").write_text("\n".join(["image_path", *names]))
    (folder / "bad" / "7.png").write_bytes((folder / "bad" / "7.png").read_bytes()[:200])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "TRAINING_IMAGES", 200)
        for script, *words in stages("one"):
            run_script(f"{script}.py", *words)
    shutil.rmtree("outputs/cache")  # of the classifier
    script, *words = stages("bad-output")[0]
    bad = [script, *words, "--path_to_data", "bad/data.csv"]
    commands = json.dumps([*stages("three"), bad])
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    yield folder, run_forked("-c", FORK, commands, 20_000 + os.getpid() % 9000, env=env)
    os.chdir(before)


def test_three_processes_write_what_one_writes(done: Outcome) -> None:
    folder, process = done
    one, three = folder / "one", folder / "three"
    assert process.stdout.count("next:") == 3, process.stderr  # only the main process prints
    names = {path.relative_to(one) for path in one.rglob("*") if ".pictures" not in str(path)}
    assert names == {x.relative_to(three) for x in three.rglob("*") if ".pictures" not in str(x)}
    for name in names:
        if name.suffix in (".npy", ".csv"):
            assert (one / name).read_bytes() == (three / name).read_bytes(), name
        elif name.suffix == ".png":
            with Image.open(one / name) as first, Image.open(three / name) as second:
                assert np.array_equal(first, second), name
    assert len([*three.glob("shards/indices-*.npy")]) == 7
    for name in ("errors/reconstructions.json", "bits/likelihood.json"):
        first, second = (json.loads((x / name).read_text())["metrics"] for x in (one, three))
        assert first == second


def test_a_fault_in_one_process_ends_all_with_one_line(done: Outcome) -> None:
    folder, process = done
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: rank 1: 1 of 12 files in bad/data.csv cannot be read")
    assert "Traceback" not in process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == [2, 2, 2]
    assert not (folder / "bad-output" / "indices").exists()


@pytest.mark.parametrize("world_size", range(1, 8))
def test_each_row_belongs_to_one_process(world_size: int) -> None:
    groups = [Distributed(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    for count in range(1, 40):
        if count < world_size:
            with pytest.raises(UserError, match="too few for"):
                groups[0].block(count, 4)
            continue
        blocks = [range(count)[group.block(count, 4)] for group in groups]
        assert [row for block in blocks for row in block] == list(range(count))
        assert all(blocks)
        if count > 4 * (world_size - 1):  # the batches of one process
            assert all(block.start % 4 == 0 for block in blocks)
