"""What the tests share: small images, scripts called as a user would, an MLflow store."""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from torch import Tensor

from benchmarks.reading import call_script
from tests.forks import Forked
from utils import cli, tracking
from utils.data import download, indices
from utils.data.indices import IndicesMeta
from utils.data.sources import Row

ROOT = Path(__file__).resolve().parents[1]
TINY_TOKENIZER = (
    *("--channels", "8", "--num_res_blocks", "1", "--codebook_size", "16", "--codebook_dim", "4"),
    *("--batch_size", "4", "--num_workers", "0"),
)
PICTURE = Image.new("RGB", (8, 8), (200, 0, 0))
TINY_GPT = ("--dim", "16", "--num_heads", "2", "--num_layers", "1", "--batch_size", "4")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers take one file at a time, the longest and those of the pipeline first."""
    first = ("test_docs", "test_browser", "test_pipeline", "test_lineage")
    items.sort(key=lambda item: item.path.stem not in first)  # stable: the order in a file stays


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in an empty folder of its own, with an MLflow store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def quick_stores() -> Iterator[None]:
    """A new MLflow store gets a copy of the first one's tables, which take five seconds to make."""
    from mlflow.store.db import utils

    make, first = utils._initialize_tables, sqlite3.connect(":memory:", check_same_thread=False)

    def initialise(engine: Any) -> None:
        made = first.execute("SELECT name FROM sqlite_master").fetchone()
        if not made:
            make(engine)
        with contextlib.closing(engine.raw_connection()) as connection:
            stores = connection.driver_connection, first
            source, target = reversed(stores) if made else stores
            source.backup(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", initialise)
        yield


def write_images(
    folder: Path, count: int = 12, size: tuple[int, int] = (24, 40), labels: str = "ab"
) -> Path:
    """`count` RGB images, soft blobs on a gradient, and their CSV data.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    lines = ["image_path,label"]
    for number in range(count):
        centre = generator.uniform((0, 0), size)
        blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 30)
        pixels = np.stack([255 * blob, y * 6, x * 6], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{labels[number % len(labels)]}")
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return folder / "data.csv"


def parsed(**flags: object) -> Any:
    """A parser of flags that are parsed already, for `cli.run`."""
    return SimpleNamespace(parse_args=lambda: Namespace(**flags))


def write_shards(
    folder: str | Path, grids: Tensor, rows: list[Row], meta: IndicesMeta, per_shard: int
) -> Path:
    """An indices folder with so many grids in each file."""
    parts = grids.split(per_shard)
    with indices.new_folder(Path(folder), rows, meta) as staging:
        for number, part in enumerate(parts):
            path = indices.shard_path(staging, "indices", number, len(parts))
            indices.save_grids(path, part, meta.codebook_size)
    return Path(folder)


def run_script(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script of the repository from the current folder, in this process: PyTorch is loaded.

    Tests of a whole pipeline use it; those of signals and of several processes start processes.
    """
    out, error, code = io.StringIO(), io.StringIO(), 0
    module = script.removesuffix(".py").replace("/", ".")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            call_script(module, *arguments)
        except SystemExit as end:
            code = end.code
    assert code in (0, None) or not check, error.getvalue()
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), error.getvalue())


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Call a script in this process; it must fail as a user's error does: one line, code 2."""

    def call(module_name: str, *arguments: object) -> str:
        module = importlib.import_module(module_name)
        monkeypatch.setattr(sys, "argv", [module_name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.run(module.main, module.make_parser())
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return call


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Call evaluate.py in this process; what it printed."""

    def call(*arguments: object) -> str:
        module = importlib.import_module("evaluate")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        capsys.readouterr()
        cli.run(module.main, module.make_parser())
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of a folder of digits, with CSVs of its first hundreds beside it."""
    folder = tmp_path_factory.mktemp("digits")
    download.write_images(folder, "digits", download.digits())
    with (folder / "digits.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    for name, part in {"train": rows[:600], "test": rows[600:800], "other": rows[800:950]}.items():
        lines = [["image_path", "label"], *(row[:2] for row in part)]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    return folder


def next_command(output: str) -> list[str]:
    """The words of the command that a script ends with."""
    found = re.search(r"next:\n  python (.*)", output)
    assert found, output
    script, *words = shlex.split(found.group(1))
    return [os.path.relpath(script, ROOT), *words]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all five scripts ran; each call is the one the script before printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    before = Path.cwd()
    os.chdir(folder)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        data = write_images(Path("data"))
        tiny = (*TINY_TOKENIZER, "--max_epochs", 3, "--val_fraction", 0.34)
        done = run_script("train_vqvae.py", "--path_to_data", data, *tiny)
        done = run_script(*next_command(done.stdout), "--text")
        tiny = (*TINY_GPT, "--max_epochs", 4, "--window_size", 3)
        done = run_script(*next_command(done.stdout), *tiny)
        sampling = ("--num_images", 5, "--labels", "b", "a", "--top_k", 9)
        sampling = (*sampling, "--output_dir", "samples")
        done = run_script(*next_command(done.stdout), *sampling)
        run_script(*next_command(done.stdout), "--output_dir", "images")
    finally:
        os.chdir(before)
    return folder


FIRST_START = """
import sys
from pathlib import Path
import mlflow
from utils.tracking import Run
print("ready", flush=True)
sys.stdin.readline()
with Run(Path("outputs") / sys.argv[1], stage="gpt", experiment="first") as run:
    run.metrics("train", {"loss": 0.5}, 1)
print(run.run_id)
"""


def environment(**values: str) -> dict[str, str]:
    """This one's, without what says where MLflow is."""
    kept = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    return kept | {"PYTHONPATH": str(ROOT)} | values


def start_twice(folder: Path) -> list[str]:
    """Open a run in two processes in the same moment; the run's id or the error of each."""
    # MLflow takes such a file for a store, of a kind that it then refuses.
    (folder / "mlruns" / "0").mkdir(parents=True)
    (folder / "mlruns" / "0" / "meta.yaml").write_text("artifact_location: x\n")
    with contextlib.chdir(folder):
        processes = [Forked("-c", FIRST_START, name, env=environment()) for name in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = []
    for process in processes:
        out, error = process.communicate(timeout=200)
        results.append(out.strip() if process.returncode == 0 else error)
    return results


@pytest.fixture(scope="session")
def first_starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder in which two processes opened a run in the same moment; the result of each.

    It takes long, so that the first of several workers makes it for all; no test changes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first"
    results = folder / "results.json"
    with FileLock(f"{folder}.lock"):
        if not results.is_file():
            results.write_text(json.dumps(start_twice(folder)))
    return folder, json.loads(results.read_text())


@pytest.fixture
def store(
    first_starts: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A client of a copy of that store: a new one takes MLflow five seconds."""
    import mlflow

    shutil.copy(first_starts[0] / "mlflow.db", tmp_path)
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(tmp_path)
    return mlflow.MlflowClient(address)


def open_run(folder: str = "out", **options: Any) -> tracking.Run:
    return tracking.Run(Path(folder), **{"stage": "tokenizer", "experiment": "tests"} | options)


def lines_of(run: tracking.Run) -> list[dict]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").open()]
