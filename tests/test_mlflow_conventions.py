"""What MLflow's own client does, a run does as well; runs can be compared; trouble is contained."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from tests.conftest import PICTURE, lines_of, open_run
from utils import addresses, provenance, tracking
from utils.cli import Flags, UserError
from utils.provenance import Stage
from utils.tracking import store as mlflow_store
from utils.tracking import sync
from utils.tracking.__main__ import replay

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses


def experiment_name(store: Any, run: tracking.Run) -> str:
    return store.get_experiment(store.get_run(run.run_id).info.experiment_id).name


def test_experiments_of_the_environment(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    number = store.create_experiment("by-id")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    with open_run(experiment="") as run:
        assert experiment_name(store, run) == "by-id"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by-name")
    with open_run(experiment="") as run:
        assert experiment_name(store, run) == "by-name"
    with open_run(experiment="chosen") as run:
        assert experiment_name(store, run) == "chosen"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    options = {"experiment": "", "inputs": {"cats/data.csv": "ab"}}
    with open_run(tags={"tokenizer_run_id": run.run_id}, **options) as gpt:
        assert experiment_name(store, gpt) == "chosen"
    with open_run(**options) as run:
        assert experiment_name(store, run) == "cats"


def test_a_platform_s_run_is_used_once_and_is_a_parent_then(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = store.create_run(store.create_experiment("platform")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", mine)
    with open_run(params={"a": 1}) as run:
        run.metrics("train", {"loss": 1.0}, 1)
    assert run.run_id == mine
    found = store.get_run(mine)
    assert (found.info.status, found.data.tags["stage"]) == ("FINISHED", "tokenizer")
    assert (found.data.params, found.data.metrics) == ({"a": "1"}, {"train/loss": 1.0})
    with tracking.continue_run(Path("later"), None, "f" * 32) as later:  # a model from elsewhere
        later.metrics("test", {"mse": 0.5}, 0)
    assert store.get_run(mine).data.metrics["test/mse"] == 0.5
    with open_run(stage="gpt", experiment="") as child:
        pass
    assert store.get_run(child.run_id).data.tags["mlflow.parentRunId"] == mine
    assert experiment_name(store, child) == "platform"


def test_nested_runs_names_and_tags(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = store.create_run("0").info.run_id
    for name, value in {
        "MLFLOW_RUN_ID": mine,
        "MLFLOW_NESTED_RUN": "TRUE",
        "MLFLOW_RUN_NAME": "named",
        "MLFLOW_TAGS": '{"team": "vision", "n": 3}',
    }.items():
        monkeypatch.setenv(name, value)
    with open_run() as run:
        pass
    found = store.get_run(run.run_id)
    tags = found.data.tags
    assert (tags["mlflow.parentRunId"], tags["team"], tags["n"]) == (mine, "vision", "3")
    assert found.info.run_name == "named"
    # MLflow's own context.
    assert tags["mlflow.user"]
    assert tags["mlflow.source.name"]
    assert tags["mlflow.source.type"] == "LOCAL"
    monkeypatch.setenv("MLFLOW_TAGS", "team=vision")
    with pytest.raises(UserError, match="MLFLOW_TAGS must be a JSON object"):
        open_run()
    monkeypatch.delenv("MLFLOW_TAGS")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(UserError, match="no MLflow run"):
        open_run()


def test_a_deleted_experiment_is_named_with_a_way_out(store: Any) -> None:
    store.delete_experiment(store.create_experiment("gone"))
    with pytest.raises(UserError, match=r"'gone' is deleted.* --experiment.* restore"):
        open_run(experiment="gone")


def test_names_say_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"run_name": "", "dropout": 0.5, "dim": 64, "output_dir": "x", "labels": None}
    values |= {"path_to_data": "/a/b.csv", "levels": (8, 5)}
    flags = Flags(**values)
    flags.given = frozenset(values)
    assert tracking.given_settings(flags) == {"dim": 64, "dropout": 0.5, "levels": (8, 5)}
    assert tracking.name_of(flags, "gpt-4x64") == "gpt-4x64-dropout0.5-levels_8_5"
    flags.learning_rate, flags.batch_size = 0.001, 512
    flags.given |= {"learning_rate", "batch_size"}
    assert tracking.name_of(flags, "gpt-4x64") == "gpt-4x64-bs512-dropout0.5-lr0.001"
    monkeypatch.setenv("MLFLOW_RUN_NAME", "by platform")
    assert tracking.name_of(flags, "gpt-4x64") == "by platform"
    flags.run_name = "mine"
    assert tracking.name_of(flags, "gpt-4x64") == "mine"


def test_runs_have_the_same_parameters_whatever_was_given(store: Any) -> None:
    keys = []
    for given in ({}, {"dropout": 0.5}, {"dropout": 0.1, "patience": 3}):
        flags = Flags(**given, batch_size=4)
        flags.given = frozenset([*given, "batch_size"])
        with open_run(params={"batch_size": 4}, flags=flags) as run:
            pass
        params = store.get_run(run.run_id).data.params
        keys.append(params.keys())
        assert params["flags"] == (" ".join(f"{k}={v}" for k, v in given.items()) or "none")
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize(
    ("address", "kind", "source"),
    [
        ("data.csv", "local", {"uri": "{here}/data.csv"}),
        ("s3://bucket/data.csv", "s3", {"uri": "s3://bucket/data.csv"}),
        ("https://host/data.csv", "http", {"url": "https://host/data.csv"}),
    ],
)
def test_mlflow_reads_the_source_of_a_data_set(
    store: Any, address: str, kind: str, source: dict[str, str]
) -> None:
    import mlflow

    with open_run(inputs={address: "ab" * 32}) as run:
        pass
    data_set = store.get_run(run.run_id).inputs.dataset_inputs[0].dataset
    expected = {key: value.format(here=Path.cwd()) for key, value in source.items()}
    assert (data_set.source_type, json.loads(data_set.source)) == (kind, expected)
    assert mlflow.data.get_source(data_set).to_dict() == expected


@pytest.mark.parametrize("call", ["set_tag", "log_text"])
def test_another_user_s_run_keeps_nothing_from_one_s_own(
    store: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, call: str
) -> None:
    theirs = open_run("theirs")
    theirs.close()
    real = getattr(type(store), call)

    def guarded(self: Any, run_id: str, *arguments: Any, **options: Any) -> Any:
        if run_id == theirs.run_id:
            raise MlflowException("not yours", error_code=1003)  # PERMISSION_DENIED
        return real(self, run_id, *arguments, **options)

    monkeypatch.setattr(type(store), call, guarded)
    upstream = (Stage("tokenizer", "python t.py", run_id=theirs.run_id, sha256="cd" * 32),)
    with open_run("mine", stage="gpt", inputs={"data.csv": "ab" * 32}, upstream=upstream) as run:
        pass
    found = store.get_run(run.run_id)
    assert found.inputs.dataset_inputs[0].dataset.name == "data.csv"
    assert "lineage.json" in {file.path for file in store.list_artifacts(run.run_id)}
    assert found.data.tags["tokenizer_run_id"] == theirs.run_id
    said = capsys.readouterr().err
    assert "not yours" in said
    assert "not in MLflow: 1 lineage" in said
    assert found.info.status == "FINISHED"


def test_without_mlflow_everything_is_in_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error_of: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with open_run(inputs={"data.csv": "ab"}, config={"a": 1}) as run:
        run.metrics("train", {"loss": 1.0}, 1)
        run.picture("pictures/samples", PICTURE, 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("not logged to MLflow: MLflow is not installed")
    assert run.ui_hint == "not logged to MLflow"
    assert lines_of(run)[0]["train/loss"] == 1.0
    assert len(provenance.from_json(Path("out/lineage.json").read_text(), "")) == 1
    with tracking.continue_run(Path("later"), None, "f" * 32) as later:
        later.metrics("samples", {"accuracy": 1.0}, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert "is not installed" in line
    assert tracking.home_of("f" * 32) is None
    with pytest.raises(UserError, match="MLflow is not installed"):
        addresses.fetch("runs:/abc/checkpoints")
    assert "MLflow is not installed" in error_of("utils.tracking.__main__", "--replay", "out")


def test_an_artifact_store_that_fails_takes_no_metric(
    store: Any, capsys: pytest.CaptureFixture
) -> None:
    store.create_experiment("nowhere", artifact_location="/proc/nowhere")
    with open_run(experiment="nowhere", config={"a": 1}) as run:
        for step in range(5):
            run.metrics("train", {"loss": 1.0}, step)
            run.picture("pictures/samples", PICTURE, step)
    assert len(store.get_metric_history(run.run_id, "train/loss")) == 5
    assert store.get_run(run.run_id).info.status == "FINISHED"
    _, last = capsys.readouterr().err.splitlines()
    assert "5 pictures" in last
    assert "--replay out" in last
    assert "metric" not in last


def test_pictures_have_mlflow_s_folder_to_themselves(store: Any) -> None:
    """Any other file there hides all pictures of the run."""
    with open_run() as run:
        for name in ("images", "images/grid"):
            with pytest.raises(ValueError, match="reserves the artifact folder images/"):
                run.file(run.output_dir / "lineage.json", name)


def test_folders_with_any_name(
    first_starts: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a %20?b#c"
    Path(name).mkdir()
    monkeypatch.chdir(name)
    shutil.copy(first_starts[0] / "mlflow.db", ".")
    with open_run() as run:
        run.file(run.output_dir / "lineage.json", "extra")
    assert addresses.fetch(f"runs:/{run.run_id}/extra/lineage.json").is_file()
    assert list(Path("mlruns").rglob("lineage.json"))
    assert [path.name for path in Path("..").iterdir()] == [name]
    (line,) = [x for x in run.ui_hint.splitlines() if "mlflow ui" in x]
    assert line.endswith("--backend-store-uri sqlite:///mlflow.db")


def test_a_renamed_project_folder_is_noticed(
    first_starts: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    here = Path.cwd()
    Path("before").mkdir()
    monkeypatch.chdir("before")
    shutil.copy(first_starts[0] / "mlflow.db", ".")
    open_run().close()
    assert "warning" not in capsys.readouterr().err
    monkeypatch.chdir(here)
    Path("before").rename("after")
    monkeypatch.chdir("after")
    open_run("other").close()
    assert f"warning: {here}/before, which held this experiment's files" in capsys.readouterr().err


def test_a_copy_of_an_output_folder_gets_a_run_of_its_own(
    store: Any, capsys: pytest.CaptureFixture
) -> None:
    with open_run(inputs={"data.csv": "ab"}) as first:
        first.metrics("train", {"loss": 1.0}, 1)
    shutil.copytree("out", "copy")
    with open_run("copy", run_id=first.run_id, continued=True) as copy:
        copy.metrics("train", {"loss": 2.0}, 2)
    assert copy.run_id != first.run_id
    assert "is a copy of" in capsys.readouterr().out
    assert store.get_run(first.run_id).data.metrics == {"train/loss": 1.0}
    steps = [one.step for one in store.get_metric_history(copy.run_id, "train/loss")]
    assert steps == [1, 2]
    # One that was moved goes on.
    Path("out").rename("moved")
    with open_run("moved", run_id=first.run_id, continued=True) as moved:
        pass
    assert moved.run_id == first.run_id
    assert store.get_run(first.run_id).data.tags["output_dir"] == str(Path("moved").resolve())


def test_a_replay_restores_the_end_and_the_model_s_metrics(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("best").mkdir()
    run = open_run(inputs={"data.csv": "ab" * 32})

    def gone(*arguments: object, **options: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        for call in ("set_terminated", "create_logged_model", "log_batch"):
            patch.setattr(type(store), call, gone)
        (run.output_dir / "best").mkdir()
        (run.output_dir / "best" / "model.safetensors").write_text("w")
        run.model(run.output_dir / "best", {"val/best_mse": 0.5}, 7)
        run.close()
    ended = sync.read_events(Path("out"))[-1]
    replay(store, Path("out"))
    found = store.get_run(run.run_id)
    assert (found.info.status, found.info.end_time) == ("FINISHED", ended.milliseconds)
    (output,) = found.outputs.model_outputs
    (metric,) = store.get_logged_model(output.model_id).metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("val/best_mse", 0.5, "data.csv")


def test_passwords_are_in_no_line(monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
    for address, shown in {
        "https://me:hush@host/x?a=1": "https://host/x?a=1",
        "postgresql://host/db?user=me&password=hush": "postgresql://host/db?user=me&password=...",
        "s3://b/x?X-Amz-Signature=hush&b=2": "s3://b/x?X-Amz-Signature=...&b=2",
    }.items():
        assert addresses.without_credentials(f"at {address} now") == f"at {shown} now"
    address = "s3://me:hush@bucket/data.csv"
    monkeypatch.setattr(sys, "argv", ["train.py", "--path_to_data", address])
    with open_run("data", inputs={address: "ab"}) as run:
        pass
    assert run.lineage[0].command == "python train.py --path_to_data s3://bucket/data.csv"
    assert "hush" not in repr(run.lineage) + repr(store.get_run(run.run_id).to_dictionary())
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@host")
        hint = mlflow_store.ui_hint(store.get_run(run.run_id))
    assert "hush" not in hint
    assert "https://host/#/experiments" in hint
