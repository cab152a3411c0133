"""All stages against MLflow as a team has it: PostgreSQL, an S3-compatible store, a password.

`make team` runs these tests; they need Debian's package postgresql.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from benchmarks.screenshots import wait_for
from tests.conftest import ROOT, TINY_GPT, TINY_TOKENIZER, next_command, run_script, write_images
from tests.forks import Forked, run_forked
from tests.team_server import BUCKET, PATIENCE, TeamServer, binaries, team_server
from utils.tracking import sync
from utils.tracking.__main__ import replay

pytestmark = [
    pytest.mark.skipif(binaries() is None, reason="PostgreSQL is missing: install postgresql"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what MLflow uses
]
TORCHRUN = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    *("--start-method", "fork", "--run-path"),  # torchrun starts them as its forks
)


@pytest.fixture(scope="module")
def server() -> Iterator[TeamServer]:
    with team_server() as running:
        yield running


@pytest.fixture
def team(server: TeamServer, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TeamServer:
    """The server, with its address and password in the environment, and nothing of the store."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3"))]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return server


def client() -> Any:
    import mlflow

    return mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def artifacts(run_id: str, folder: str | None = None) -> set[str]:
    """All files among the artifacts of a run."""
    found = client().list_artifacts(run_id, folder)
    files = {one.path for one in found if not one.is_dir}
    return files.union(*(artifacts(run_id, one.path) for one in found if one.is_dir))


def in_store(server: TeamServer) -> list[str]:
    """The keys of all objects of the bucket."""
    pages = server.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [one["Key"] for page in pages for one in page.get("Contents", ())]


def status_of(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "status.json").read_text())


def check_metrics(folder: str) -> None:
    """Every metric of the output folder is in MLflow, and once."""
    run_id = status_of(folder)["run_id"]
    lines = sync.read_metrics(Path(folder))
    here = Counter(
        (name, line.step, line.milliseconds, value)
        for line in lines
        for name, value in line.values.items()
    )
    there = Counter(
        (point.key, point.step, point.timestamp, point.value)
        for name in client().get_run(run_id).data.metrics
        for point in client().get_metric_history(run_id, name)
    )
    assert set(here.values()) == {1}
    assert here == there


def test_all_stages(team: TeamServer, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage after the first reads what it needs from MLflow, as on another machine."""
    data = write_images(own_folder / "data").absolute()
    tiny = (*TINY_TOKENIZER, "--max_epochs", 2, "--val_fraction", 0.34, "--register", "blobs")
    run_script("train_vqvae.py", "--path_to_data", data, *tiny, "--output_dir", "tokenizer")
    tokenizer = status_of("tokenizer")["run_id"]
    (own_folder / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    flags = ("--model_dir", "models:/blobs@champion", "--path_to_data", data)
    done = run_script("quantize_dataset.py", *flags, "--output_dir", "indices")
    tiny = (*TINY_GPT, "--max_epochs", 2, "--window_size", 3, "--output_dir", "gpt")
    run_script(*next_command(done.stdout), *tiny)
    gpt = status_of("gpt")["run_id"]
    model = ("--model_path", f"runs:/{gpt}/checkpoints/best")
    sampling = ("--num_images", 2, "--labels", "b", "--output_dir", "samples", "--run_id", gpt)
    run_script("transformer_generation.py", *model, *sampling)
    decoder = ("--model_dir", f"runs:/{tokenizer}/checkpoints/best")
    flags = ("--indexes_path", "samples", *decoder, "--output_dir", "images")
    run_script("vqvae/images_from_indexes.py", *flags)
    flags = ("--path_to_data", data, *decoder)
    run_script("evaluate.py", "reconstructions", *flags, "--output_dir", "errors")
    run_script("evaluate.py", "likelihood", *flags, *model, "--output_dir", "bits")

    runs = {run_id: client().get_run(run_id) for run_id in (tokenizer, gpt)}
    assert [run.info.status for run in runs.values()] == ["FINISHED"] * 2
    assert runs[gpt].data.tags["tokenizer_run_id"] == tokenizer
    assert {"train/mse", "val/psnr", "test/mse"} <= set(runs[tokenizer].data.metrics)
    assert {"val/bits_per_token", "test/bits_per_token"} <= set(runs[gpt].data.metrics)
    files = {run_id: artifacts(run_id) for run_id in runs}
    model_files = {"checkpoints/best/model.safetensors", "checkpoints/best/config.json"}
    assert model_files <= files[tokenizer] & files[gpt]
    assert any(name.startswith("images/") and name.endswith(".png") for name in files[tokenizer])
    assert {"indices/data/indices.npy"} <= files[tokenizer]
    assert {"generated/images/grid.png", "generated/samples/indices.npy"} <= files[gpt]
    keys = in_store(team)
    for run_id, run in runs.items():
        place = f"{run.info.experiment_id}/{run_id}/artifacts/"
        assert {f"{place}{name}" for name in files[run_id]} == {x for x in keys if place in x}
        with psycopg.connect(team.database("mlflow")) as database:
            query = "SELECT key, value FROM params WHERE run_uuid = %s"
            assert dict(database.execute(query, [run_id]).fetchall()) == run.data.params != {}
    written = [path for path in own_folder.rglob("*") if path.is_file()]
    assert not [path for path in written if team.password.encode() in path.read_bytes()]


@pytest.mark.parametrize("password", ["mistyped", ""], ids=["wrong", "none"])
def test_a_wrong_password(
    team: TeamServer, own_folder: Path, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    data = write_images(own_folder / "data")
    done = run_forked(ROOT / "train_vqvae.py", "--path_to_data", data, *TINY_TOKENIZER)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot use MLflow at {team.address} (")
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in line
    assert "mistyped" not in done.stdout + done.stderr


def test_a_server_that_restarts_loses_nothing(team: TeamServer, own_folder: Path) -> None:
    data = write_images(own_folder / "data")
    flags = (*TINY_TOKENIZER, "--max_steps", 300, "--evaluate_every", 10, "--output_dir", "out")
    said = ""

    def lines() -> int:
        file = Path("out", "metrics.jsonl")
        return len(file.read_text().splitlines()) if file.exists() else 0

    def warned() -> bool:
        nonlocal said
        said += training.stderr.read()
        return "warning: MLflow" in said

    with Forked(ROOT / "train_vqvae.py", "--path_to_data", data, *flags) as training:
        wait_for(lambda: lines() >= 3, PATIENCE)
        team.stop_mlflow()
        before = lines()
        wait_for(warned, PATIENCE)
        wait_for(lambda: lines() >= before + 3, PATIENCE)
        training.send_signal(signal.SIGSTOP)  # or it would be over before the server is back
        assert status_of("out")["status"] == "RUNNING"
        team.start_mlflow()
        training.send_signal(signal.SIGCONT)
        training.wait()
        assert training.returncode == 0, training.stderr.read()
    check_metrics("out")
    run_id = status_of("out")["run_id"]
    assert client().get_run(run_id).info.status == "FINISHED"
    pictures = len(list(Path("out", "pictures").iterdir()))
    shown = [name for name in artifacts(run_id) if name.startswith("images/")]
    assert len([name for name in shown if name.endswith(".png")]) == pictures
    assert not replay(client(), Path("out")).total()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(team: TeamServer, own_folder: Path, rank: int) -> None:
    """Its run is FAILED within seconds, and its folder resumes; rank 0 is the one that logs."""
    data = write_images(own_folder / "data")
    flags = (*TINY_TOKENIZER, "--evaluate_every", 1000, "--checkpoint_every", 10)
    flags = ("--path_to_data", data, *flags, "--output_dir", "out", "--device", "cpu")
    script = (*TORCHRUN, ROOT / "train_vqvae.py")
    with Forked(*script, *flags, "--max_steps", 100_000) as training:
        wait_for(lambda: list(Path("out").glob("checkpoints/*20")), PATIENCE)
        ranks = psutil.Process(training.pid).children()  # in the order of their start
        ranks[rank].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        training.wait()
        assert time.monotonic() - killed_at < 60
        assert f"rank      : {rank}" in training.stderr.read()
    status = status_of("out")
    run_id = status["run_id"]
    assert client().get_run(run_id).info.status == "FAILED"
    assert status["status"] == ("FAILED" if rank else "RUNNING")  # as of any killed process
    # A checkpoint may be newer than the status of a killed process.
    last = max(int(path.name[-8:]) for path in Path("out", "checkpoints").glob("step-*[0-9]"))
    run_forked(*script, "--resume", "out", "--max_steps", last + 10, check=True)
    assert status_of("out")["run_id"] == run_id
    assert status_of("out")["step"] == last + 10
    assert client().get_run(run_id).info.status == "FINISHED"
    check_metrics("out")
