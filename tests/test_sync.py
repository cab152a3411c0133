"""What MLflow missed is sent later, and nothing is sent twice."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import PICTURE, open_run
from utils import tracking
from utils.cli import UserError
from utils.provenance import LINEAGE
from utils.tracking import __main__ as command
from utils.tracking import sync
from utils.tracking.sync import EVENTS, METRICS, Event

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses
FULL = Counter(metric=60, picture=2, file=1, folder=1, table=1, status=1)


class Gone(Exception):
    """The server is."""


def log_all(run: tracking.Run) -> None:
    (run.output_dir / "best").mkdir(exist_ok=True)
    (run.output_dir / "best" / "weights.txt").write_text("w")
    for step in range(30):
        run.metrics("train", {"loss": 1 / (step + 1), "rate": float("nan")}, step)
    for step in (0, 20):
        run.picture("pictures/samples", PICTURE, step)
    run.table("pairs", {"image_path": ["0001", "b"], "original": [PICTURE, PICTURE]})
    run.folder(run.output_dir / "best", "checkpoints/best")
    run.file(run.output_dir / "best" / "weights.txt", "extra")


def everything(client: Any, run_id: str) -> tuple:
    """What MLflow has of a run."""
    run = client.get_run(run_id)
    history = {
        key: [(m.step, m.timestamp, str(m.value)) for m in client.get_metric_history(run_id, key)]
        for key in ("train/loss", "train/rate")
    }
    names = [Path(one.path).name for one in client.list_artifacts(run_id, "images")]
    files = [one.path for one in client.list_artifacts(run_id, "checkpoints/best")]
    files += [one.path for one in client.list_artifacts(run_id) if one.path == LINEAGE]
    tags = {"mlflow.loggedImages": run.data.tags.get("mlflow.loggedImages")}
    return history, sorted(names), files, tags, run.info.status


def test_a_run_that_mlflow_has_is_not_sent_again(store: Any, capsys: pytest.CaptureFixture) -> None:
    with open_run(config={"a": 1}) as run:
        log_all(run)
    before = everything(store, run.run_id)
    assert not command.replay(store, Path("out")).total()
    assert everything(store, run.run_id) == before
    command.main(command.make_parser().parse_args(["--replay", "out"]))
    assert capsys.readouterr().out == "sent: nothing, MLflow has it all\n"


def test_all_that_mlflow_missed(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in the folder, and stayed there."""
    run = open_run(config={"a": 1})
    at_the_start, deadline = {"config.json", LINEAGE}, time.monotonic() + 120
    while not at_the_start <= {file.path for file in store.list_artifacts(run.run_id)}:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    def gone(*arguments: object, **options: object) -> None:
        raise Gone

    with monkeypatch.context() as patch:
        for name in ("log_batch", "log_image", "log_artifact", "log_artifacts", "set_tag"):
            patch.setattr(type(store), name, gone)
        patch.setattr(type(store), "set_terminated", gone)
        log_all(run)
        run.close("KILLED")
    assert everything(store, run.run_id)[-1] == "RUNNING"
    Path("out").rename("moved")
    assert command.replay(store, Path("moved")) == FULL
    history, names, files, tags, status = everything(store, run.run_id)
    lines = [json.loads(line) for line in Path("moved/metrics.jsonl").read_text().splitlines()]
    assert history["train/loss"] == [
        (line["step"], int(line["time"] * 1000), str(line["train/loss"])) for line in lines
    ]
    assert len(names) == 4
    assert files == ["checkpoints/best/weights.txt", "lineage.json"]
    assert tags == {"mlflow.loggedImages": "True"}
    assert status == "KILLED"
    table = store.load_table(
        store.get_run(run.run_id).info.experiment_id, "tables/pairs.json", [run.run_id]
    )
    assert len(table) == 2
    assert not command.replay(store, Path("moved")).total()


def test_a_picture_that_came_through_in_half(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow keeps a small version of each, which is sent second."""
    real, failures = type(store).log_artifacts, iter([Gone])

    def half(self: Any, run_id: str, folder: str, name: str) -> None:
        for error in failures:
            next(Path(folder).glob("*.webp")).unlink()
            real(self, run_id, folder, name)
            raise error
        real(self, run_id, folder, name)

    monkeypatch.setattr(type(store), "log_artifacts", half)
    with open_run() as run:
        picture = run.picture("pictures/samples", PICTURE, 3)
    command.replay(store, Path("out"))
    files = sorted(file.path for file in store.list_artifacts(run.run_id, "images"))
    assert [file.split(".")[-1] for file in files] == ["webp", "png"]
    home = Path(store.get_run(run.run_id).info.artifact_uri.removeprefix("file://"))
    with Image.open(home / files[0]) as sent, Image.open(picture) as here:
        assert sent.getpixel((0, 0))[0] == pytest.approx(here.getpixel((0, 0))[0], abs=9)


def test_a_folder_of_two_runs(store: Any) -> None:
    """Each run gets what it logged, also where both were open at once."""
    runs = [open_run(), open_run()]
    for step in range(3):
        for run in runs:
            run.metrics("train", {"loss": float(runs.index(run))}, step)
    for run in runs:
        values = {"train/loss": float(runs.index(run))}
        line = Event(99999999998.0, run.run_id, step=3, values=values)
        sync.append(Path("out") / METRICS, line)
        run.close()
    with Path("out/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ti')
    assert command.replay(store, Path("out"))["metric"] == 2
    for number, run in enumerate(runs):
        history = store.get_metric_history(run.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == [(step, number) for step in range(4)]


def test_a_later_stage_does_not_hide_how_the_training_ended(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last entry of the event log was taken for the run's last word."""
    run = open_run()
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "set_terminated", lambda *_: (_ for _ in ()).throw(Gone))
        run.close("FAILED")
    with tracking.continue_run(Path("out"), run.run_id, "", part="samples") as later:
        later.picture("samples", PICTURE, 0)
    assert store.get_run(run.run_id).info.status == "RUNNING"
    command.replay(store, Path("out"))
    assert store.get_run(run.run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "lineage", "lineage": [{"name": "gpt"}]},
        {"kind": "lineage", "lineage": [{"name": "gpt", "command": "", "inputs": {"a": 1}}]},
        {"kind": "lineage", "lineage": "gpt"},
        {"kind": "picture", "path": "pictures/a.png", "name": "a", "step": "1"},
        {"kind": "picture", "path": 3, "name": "a", "step": 1},
        {"kind": "table", "name": ["a"]},
        {"kind": "folder", "path": "best"},
        {"kind": "file", "path": "a", "name": None},
        {"kind": "model", "path": "best", "values": {"a": "b"}, "step": 1},
        {"kind": "model", "path": "best", "values": [1], "step": 1},
        {"kind": "model", "path": "best", "step": 1},
        {"kind": "status", "name": "KILLED", "run_id": 7},
        {"kind": "poem", "name": "a"},
    ],
)
def test_damaged_entries_are_left_out(entry: dict, capsys: pytest.CaptureFixture) -> None:
    """They were tracebacks in the middle of a replay."""
    Path("out").mkdir()
    good = {"time": 1.0, "run_id": "a", "kind": "status", "name": "KILLED"}
    lines = [{"time": 2.0, "run_id": "a", **entry}, good]
    Path("out/mlflow.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sync.read_events(Path("out")) == [Event(**good)]
    assert "out/mlflow.jsonl: 1 damaged lines are skipped" in capsys.readouterr().err


def test_what_cannot_be_replayed(store: Any) -> None:
    with pytest.raises(UserError, match=r"nowhere has no mlflow\.jsonl"):
        command.replay(store, Path("nowhere"))
    run = open_run()
    run.close()
    store.delete_run(run.run_id)
    with pytest.raises(UserError, match="is deleted"):
        command.replay(store, Path("out"))


def test_what_mlflow_refuses_is_one_line(store: Any) -> None:
    with open_run() as run:
        run.metrics("train", {"100 % & more!": 1.0}, 1)
    with pytest.raises(UserError, match=r"MLflow does not accept all of out \("):
        command.main(command.make_parser().parse_args(["--replay", "out"]))


def test_files_outside_of_the_folder_are_not_sent(store: Any) -> None:
    """A folder of a stranger could name any file of this machine."""
    with open_run() as run:
        pass
    Path("secret").write_text("key")
    PICTURE.save("secret.png")
    Path("secret.json").write_text('{"columns": [], "data": []}')
    Path("out/best").mkdir()
    Path("out/best/secret").symlink_to("../../secret")
    for entry in (
        {"kind": "file", "path": "../secret"},
        {"kind": "file", "path": str(Path("secret").absolute())},
        {"kind": "folder", "path": "..", "name": "x"},
        {"kind": "folder", "path": "best", "name": "x"},
        {"kind": "picture", "path": "../secret.png", "name": "a"},
        {"kind": "table", "name": "../../secret"},
        {"kind": "model", "path": "best", "values": {"a": 1.0}},
    ):
        line = {"time": 1.0, "run_id": run.run_id, **entry}
        with Path("out", EVENTS).open("a") as log:
            log.write(json.dumps(line) + "\n")
    command.replay(store, Path("out"))
    home = Path(store.get_run(run.run_id).info.artifact_uri.removeprefix("file://"))
    assert (home / "lineage.json").is_file()
    assert not list(home.parents[1].rglob("*secret*"))
    assert not store.list_artifacts(run.run_id, "images")
    assert not store.get_run(run.run_id).outputs.model_outputs
