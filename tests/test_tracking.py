"""What is logged is in the output folder and in MLflow; how runs end, and go on."""

import csv
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.conftest import PICTURE, lines_of, open_run
from utils import tracking
from utils.cli import Stopped, UserError
from utils.tracking import run as tracking_run
from utils.tracking import sync
from utils.tracking.__main__ import replay
from utils.tracking.sync import EVENTS, METRICS, Event

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses


def test_what_is_logged_is_in_the_folder_and_in_mlflow(store: Any) -> None:
    Path("best").mkdir()
    Path("best/weights.txt").write_text("w")
    with open_run(
        run_name="name",
        config={"a": 1},
        params={"shape": (24, 40)},
        tags={"tokenizer_run_id": "abc"},
    ) as run:
        for step in range(30):
            run.metrics("train", {"loss": 1 / (step + 1), "learning_rate": 1e-3}, step)
            run.metrics("val", {"mse": float(step)}, step)
        picture = run.picture("final/samples", PICTURE, 3)
        run.table("pairs", {"image_path": ["a.png", "b.png"], "original": [PICTURE, PICTURE]})
        run.folder(Path("best"), "checkpoints/best")
        run.file(Path("best/weights.txt"), "extra")

    lines = lines_of(run)
    assert len(lines) == 60
    for key, count in (("train/loss", 30), ("train/learning_rate", 30), ("val/mse", 30)):
        logged = {m.step: (m.value, m.timestamp) for m in store.get_metric_history(run.run_id, key)}
        kept = {
            line["step"]: (line[key], int(line["time"] * 1000)) for line in lines if key in line
        }
        assert logged == kept
        assert len(logged) == count

    found = store.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "name"
    assert found.data.params == {"shape": "(24, 40)"}
    assert found.data.tags["stage"] == "tokenizer"
    assert found.data.tags["tokenizer_run_id"] == "abc"
    assert Path(sys.argv[0]).name in found.data.tags["mlflow.note.content"]
    assert "mlflow.runColor" not in found.data.tags
    page = f"/experiments/{found.info.experiment_id}/runs/{run.run_id}/"
    assert page in run.ui_hint
    assert run.ui_hint.endswith("workflowType=machine_learning")
    assert os.environ["MLFLOW_TRACKING_URI"] in run.ui_hint

    assert json.loads(Path("out/config.json").read_text()) == {"a": 1}
    with Image.open(picture) as image:
        assert image.getpixel((0, 0)) == (200, 0, 0)
    names = {file.path for file in walk(store, run.run_id)}
    assert {"config.json", "tables/pairs.json", "extra/weights.txt"} < names
    assert "checkpoints/best/weights.txt" in names
    assert any(name.startswith("images/final") and name.endswith(".png") for name in names)
    table = store.load_table(found.info.experiment_id, "tables/pairs.json", [run.run_id])
    assert list(table["image_path"]) == ["a.png", "b.png"]
    rows = list(csv.DictReader(Path("out/tables/pairs.csv").read_text().splitlines()))
    assert [row["image_path"] for row in rows] == ["a.png", "b.png"]
    with Image.open(Path("out/tables") / rows[1]["original"]) as image:
        assert image.size == (8, 8)


def test_a_table_takes_the_place_of_the_one_before(store: Any) -> None:
    """A training that went on after its end had every row twice."""
    with open_run() as run:
        for colour in ("a.png", "b.png"):
            run.table("pairs", {"image_path": [colour], "original": [PICTURE]})
    experiment_id = store.get_run(run.run_id).info.experiment_id
    table = store.load_table(experiment_id, "tables/pairs.json", [run.run_id])
    assert list(table["image_path"]) == ["b.png"]
    assert {file.path for file in walk(store, run.run_id)} >= {"tables/pairs/original-00000.png"}


def walk(client: Any, run_id: str, path: str | None = None) -> Iterator[Any]:
    for file in client.list_artifacts(run_id, path):
        if file.is_dir:
            yield from walk(client, run_id, file.path)
        else:
            yield file


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a bug"), "FAILED"),
        (UserError("a mistake"), "FAILED"),
        (Stopped(15), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
)
def test_how_a_run_ended(store: Any, error: BaseException, status: str) -> None:
    run = open_run()

    def train() -> None:
        with run:
            run.metrics("train", {"loss": 1.0}, 1)
            raise error

    with pytest.raises(type(error)):
        train()
    assert store.get_run(run.run_id).info.status == status
    assert store.get_run(run.run_id).data.metrics == {"train/loss": 1.0}


def test_at_most_five_params(store: Any) -> None:
    """MLflow prints them above each picture, in a card of a fixed height."""
    with pytest.raises(ValueError, match="at most 5 params, got 6"):
        open_run(params=dict.fromkeys("abcdef", 1))
    with open_run(params=dict.fromkeys("abcde", 1)) as run:
        pass
    assert len(store.get_run(run.run_id).data.params) == 5


def test_a_later_stage_adds_to_a_run_and_leaves_its_status(store: Any) -> None:
    run = open_run()
    run.metrics("train", {"loss": 1.0}, 1)
    run.close("KILLED")
    later = tracking.continue_run(Path("later"), None, run.run_id)
    with later:
        later.metrics("samples", {"accuracy": 0.5}, 0)
    found = store.get_run(run.run_id)
    assert found.info.status == "KILLED"
    assert found.data.metrics == {"train/loss": 1.0, "samples/accuracy": 0.5}


def test_a_resumed_run_goes_on(store: Any) -> None:
    first = open_run(params={"batch_size": 4})
    first.close("KILLED")
    with open_run(run_id=first.run_id, continued=True, params={"batch_size": 8}) as run:
        assert store.get_run(run.run_id).info.status == "RUNNING"
    assert run.run_id == first.run_id
    assert store.get_run(run.run_id).info.status == "FINISHED"


def test_a_resumed_run_that_is_gone_gets_a_new_one(
    store: Any, capsys: pytest.CaptureFixture
) -> None:
    """Whoever removed mlflow.db could resume no training any more."""
    with open_run(run_id="0" * 32, continued=True) as run:
        run.metrics("train", {"loss": 1.0}, 1)
    assert store.get_run(run.run_id).info.status == "FINISHED"
    assert "a new run takes its place" in capsys.readouterr().err


def test_a_lineage_is_there_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, store: Any
) -> None:
    """A crash left half of it, at which every later stage failed."""
    real = Path.write_text

    def killed(self: Path, text: str, *arguments: object, **options: object) -> int:
        if "lineage" not in self.name:
            return real(self, text, *arguments, **options)
        real(self, text[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run(inputs={"data.csv": "ab" * 32})
    assert not Path("out/lineage.json").exists()


def test_stages_that_write_into_one_folder_are_kept_apart(store: Any) -> None:
    """The second picture took the place of the first, and runs got what others logged."""
    runs = [open_run(f"gpt-{number}") for number in range(2)]
    stages = [
        tracking.continue_run(Path(), run.run_id, "", part=f"images-{number}")
        for number, run in enumerate(runs)
    ]
    pictures = [
        stage.picture("pictures/generated", Image.new("RGB", (8, 8), (90 * number, 0, 0)), 0)
        for number, stage in enumerate(stages)
    ]
    for one in (*stages, *runs):
        one.close()
    assert [picture.parent.name for picture in pictures] == [
        "images-0.pictures",
        "images-1.pictures",
    ]
    for number, picture in enumerate(pictures):
        with Image.open(picture) as image:
            assert image.getpixel((0, 0)) == (90 * number, 0, 0)
    logged = {
        event.run_id: event.path for event in sync.read_events(Path()) if event.kind == "picture"
    }
    assert logged == {run.run_id: str(one) for run, one in zip(runs, pictures, strict=True)}
    assert not replay(store, Path()).total()


def test_a_model_from_elsewhere_is_not_logged(store: Any, capsys: pytest.CaptureFixture) -> None:
    with tracking.continue_run(Path("later"), None, "0" * 32) as run:
        run.metrics("samples", {"accuracy": 0.5}, 0)
        run.picture("samples", PICTURE, 0)
    assert "--run_id" in capsys.readouterr().out
    assert not Path("later").exists()
    assert run.ui_hint == "not logged to MLflow"


def test_what_mlflow_refuses_for_good_does_not_hold_up_the_rest(
    store: Any, capsys: pytest.CaptureFixture
) -> None:
    """It was tried again for ever, and nothing came after it."""
    with open_run() as run:
        run.metrics("train", {"100 % & more!": 1.0}, 1)
        run.metrics("train", {"loss": 2.0}, 2)
    assert store.get_run(run.run_id).data.metrics == {"train/loss": 2.0}
    assert store.get_run(run.run_id).info.status == "FINISHED"
    _, last = capsys.readouterr().err.splitlines()
    assert last.startswith(
        "warning: not in MLflow: 1 metric; python -m utils.tracking --replay out"
    )
    assert len(lines_of(run)) == 2


def test_a_run_that_is_deleted_meanwhile(store: Any, capsys: pytest.CaptureFixture) -> None:
    run = open_run()
    store.delete_run(run.run_id)
    for step in range(20):
        run.metrics("train", {"loss": 1.0}, step)
    started = time.monotonic()
    run.close()
    assert time.monotonic() - started < 5
    _, last = capsys.readouterr().err.splitlines()
    assert last.startswith("warning: not in MLflow: 20 metrics, 1 status")
    assert len(lines_of(run)) == 20


def test_a_resumed_run_gets_what_a_crash_kept_back_and_nothing_twice(store: Any) -> None:
    with open_run() as run:
        for step in (1, 2, 3):
            run.metrics("train", {"loss": float(step)}, step)
    log = run.output_dir / METRICS
    # Killed before it was sent, and while it was written.
    sync.append(log, Event(7.0, run.run_id, step=2, values={"val/mse": 0.5}))
    with log.open("a") as file:
        file.write('{"step": 3, "val/m')
    late = Event(7.0, run.run_id, "file", path="config.json")
    sync.append(run.output_dir / EVENTS, late)
    Path("out/config.json").write_text("{}")
    with open_run(run_id=run.run_id, continued=True) as again:  # from the checkpoint of step 2
        again.metrics("train", {"loss": 3.0}, 3)
        again.metrics("val", {"mse": 0.25}, 3)
        again.metrics("train", {"loss": 4.0}, 4)

    def points(key: str) -> list[tuple[int, float]]:
        return [(x.step, x.value) for x in store.get_metric_history(run.run_id, key)]

    assert points("train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert points("val/mse") == [(2, 0.5), (3, 0.25)]
    assert "config.json" in {file.path for file in store.list_artifacts(run.run_id)}
    lines = [(line.step, *line.values) for line in sync.read_metrics(run.output_dir)]
    assert lines == [
        *((step, "train/loss") for step in (1, 2, 3)),
        *((step, "val/mse") for step in (2, 3)),
        (4, "train/loss"),
    ]


def test_a_sample_system() -> None:
    values = tracking_run.sample_system(psutil.net_io_counters())
    assert 0 <= values["cpu_utilization_percentage"] <= 100
    assert 0 < values["process_memory_usage_megabytes"] < values["system_memory_usage_megabytes"]
    assert all(isinstance(value, float | int) for value in values.values())


def test_the_network_is_measured_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was measured since the machine was booted."""
    before, now = (
        SimpleNamespace(bytes_recv=received, bytes_sent=sent)
        for received, sent in ((5e9, 7e9), (5e9 + 3e6, 7e9 + 1e6))
    )
    monkeypatch.setattr(psutil, "net_io_counters", lambda: now)
    values = tracking_run.sample_system(before)
    assert values["network_receive_megabytes"] == pytest.approx(3)
    assert values["network_transmit_megabytes"] == pytest.approx(1)


def test_closing_does_not_wait_for_the_next_sample(store: Any) -> None:
    run = open_run()
    started = time.monotonic()
    run.close()
    assert time.monotonic() - started < 5
    assert not any(
        "system" in key for line in sync.read_metrics(Path("out")) for key in line.values
    )


def test_a_training_logs_them(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_run, "SYSTEM_SECONDS", 0.01)
    with open_run() as run:
        deadline = time.monotonic() + 120
        while not (run.output_dir / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "system/cpu_utilization_percentage" in lines_of(run)[0]
    assert "system/cpu_utilization_percentage" in store.get_run(run.run_id).data.metrics
