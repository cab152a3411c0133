"""What MLflow missed is sent later, and nothing is sent twice."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import PICTURE, open_run
from utils import tracking
from utils.cli import UserError
from utils.tracking import __main__ as command
from utils.tracking import links, replay
from utils.tracking.store import pictures

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses
FULL = Counter(metrics=60, pictures=2, files=3, tables=1, links=1, status=1)


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
    files += [one.path for one in client.list_artifacts(run_id) if one.path == links.FILE]
    tags = {"mlflow.loggedImages": run.data.tags.get("mlflow.loggedImages")}
    return history, sorted(names), files, tags, run.info.status


def test_a_run_that_mlflow_has_is_not_sent_again(store: Any, capsys: pytest.CaptureFixture) -> None:
    with open_run(config={"a": 1}) as run:
        log_all(run)
    before = everything(store, run.run_id)
    assert not replay.replay(store, Path("out")).total()
    assert everything(store, run.run_id) == before
    command.main(command.make_parser().parse_args(["--replay", "out"]))
    assert capsys.readouterr().out == "sent: nothing, MLflow has it all\n"


def test_all_that_mlflow_missed(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in the folder, and stayed there."""
    run = open_run(config={"a": 1})

    def gone(*arguments: object, **options: object) -> None:
        raise Gone

    with monkeypatch.context() as patch:
        for name in ("log_batch", "log_image", "log_artifact", "log_artifacts", "set_tag"):
            patch.setattr(type(run._client), name, gone)
        patch.setattr(type(run._client), "set_terminated", gone)
        log_all(run)
        run.close("KILLED")
    assert everything(store, run.run_id)[-1] == "RUNNING"
    Path("out").rename("moved")
    assert replay.replay(store, Path("moved")) == FULL
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
    assert not replay.replay(store, Path("moved")).total()


def test_a_picture_that_came_through_in_half(store: Any) -> None:
    """MLflow keeps a small version of each, which it sends second."""
    with open_run() as run:
        picture = run.picture("pictures/samples", PICTURE, 3)
    ((_, files),) = pictures(store, run.run_id).items()
    home = Path(store.get_run(run.run_id).info.artifact_uri.removeprefix("file://"))
    (lost,) = [file for file in files if not file.endswith("png")]
    (home / lost).unlink()
    assert replay.replay(store, Path("out"))["pictures"] == 1
    ((_, again),) = pictures(store, run.run_id).items()
    assert sorted(again) == sorted(files)
    with Image.open(home / lost) as sent, Image.open(picture) as here:
        assert sent.getpixel((0, 0))[0] == pytest.approx(here.getpixel((0, 0))[0], abs=9)


def test_a_folder_of_two_runs(store: Any) -> None:
    """Each run gets what was logged after it was opened."""
    for value in (1.0, 2.0):
        with open_run() as run:
            run.metrics("train", {"loss": value}, 0)
        store.log_param(run.run_id, "value", value)
    with Path("out/metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "time": 99999999999.0, "train/loss": 3.0}\n{"step": 2, "ti')
    assert replay.replay(store, Path("out"))["metrics"] == 1
    assert [m.value for m in store.get_metric_history(run.run_id, "train/loss")] == [2.0, 3.0]


def test_what_cannot_be_replayed(store: Any) -> None:
    with pytest.raises(UserError, match=r"cannot read .*mlflow\.jsonl"):
        replay.replay(store, Path("nowhere"))
    run = open_run()
    run.close()
    store.delete_run(run.run_id)
    with pytest.raises(UserError, match="is deleted"):
        replay.replay(store, Path("out"))


def test_files_outside_of_the_folder_are_not_sent(store: Any) -> None:
    """A folder of a stranger could name any file of this machine."""
    with open_run() as run:
        pass
    Path("secret").write_text("key")
    with Path("out/mlflow.jsonl").open("a") as file:
        for name in ("../secret", str(Path("secret").absolute())):
            line = {"time": 99999999999.0, "file": name, "name": ""}
            file.write(json.dumps(line) + "\n")
        file.write('{"time": 99999999999.0, "folder": "..", "name": "x"}\n')
    replay.replay(store, Path("out"))
    home = Path(store.get_run(run.run_id).info.artifact_uri.removeprefix("file://"))
    assert (home / "report.html").is_file()
    assert not list(home.rglob("secret"))
