"""Logged models, and who is champion."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_run
from utils import addresses, tracking
from utils.cli import UserError
from utils.tracking import store as mlflow_store
from utils.tracking.sync import Event
from utils.training.config import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses


def train(name: str, mse: float, **options: Any) -> tracking.Run:
    """A run whose model is a folder with its name in it."""
    Path(name).mkdir()
    (Path(name) / "model.safetensors").write_text(name)
    with open_run(f"out-{name}", inputs={"data.csv": "ab" * 32}) as run:
        run.model(Path(name), {"val/best_mse": mse}, 7, register="digits", **options)
    return run


def champion() -> str:
    return (addresses.fetch("models:/digits@champion") / "model.safetensors").read_text()


def test_the_better_model_is_champion(store: Any, capsys: pytest.CaptureFixture) -> None:
    train("first", 0.5)
    assert "version 1 of digits; champion: models:/digits@champion" in capsys.readouterr().out
    assert champion() == "first"
    train("better", 0.25)
    assert "0.25 beats 0.5 of the champion, version 1" in capsys.readouterr().out
    assert champion() == "better"
    train("worse", 0.3)
    assert "version 2, stays" in capsys.readouterr().out
    train("lost", float("nan"))
    assert champion() == "better"
    assert len(store.search_model_versions("name = 'digits'")) == 4


def test_a_champion_by_another_metric_stays(store: Any, capsys: pytest.CaptureFixture) -> None:
    train("first", 0.5)
    Path("other").mkdir()
    with open_run("other-out") as run:
        run.model(Path("other"), {"val/bits_per_token": 0.1}, 1, register="digits")
    assert "has no val/bits_per_token to compare with, and stays" in capsys.readouterr().out
    assert champion() == "first"


def test_higher_may_be_better(store: Any) -> None:
    train("first", 20.0, lower_is_better=False)
    train("second", 30.0, lower_is_better=False)
    assert champion() == "second"


def test_what_is_logged_of_a_model(store: Any) -> None:
    run = train("first", 0.5)
    found = store.get_run(run.run_id)
    (output,) = found.outputs.model_outputs
    model = store.get_logged_model(output.model_id)
    assert (model.status, output.step) == ("READY", 7)
    assert model.source_run_id == run.run_id
    assert [(m.key, m.value, m.dataset_name) for m in model.metrics] == [
        ("val/best_mse", 0.5, "data.csv")
    ]
    assert found.data.metrics["val/best_mse"] == 0.5
    # What a later evaluation finds is the model's, too.
    with tracking.continue_run(Path("later"), run.run_id, "") as later:
        later.metrics("test", {"fid": 3.0}, 0)
    model = store.get_logged_model(output.model_id)
    assert {metric.key for metric in model.metrics} == {"val/best_mse", "test/fid"}


@pytest.mark.parametrize("call", ["log_outputs", "log_batch", "finalize_logged_model", ""])
def test_a_training_killed_after_any_call_goes_on_without_doubles(
    store: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    Path("first").mkdir()
    (Path("first") / "model.safetensors").write_text("w")
    with open_run("killed") as run:
        pass
    values = {"val/best_mse": 0.5}
    what = store, Path("first"), Event(1.0, run.run_id, "model", "", "first", 7, values)
    if call:
        real = getattr(type(store), call)

        def killed(*arguments: object, **options: object) -> None:
            real(*arguments, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(store), call, killed)
            with pytest.raises(KeyboardInterrupt):
                mlflow_store.log_model(*what)
    else:
        mlflow_store.log_model(*what)
    mlflow_store.log_model(*what)
    assert len({one.model_id for one in store.get_run(run.run_id).outputs.model_outputs}) == 1
    assert len(store.get_metric_history(run.run_id, "val/best_mse")) == 1


def test_a_model_is_registered_once(store: Any) -> None:
    """A finished training that was started again registered its model another time."""
    run = train("first", 0.5)
    store.delete_registered_model_alias("digits", "champion")
    event = Event(1.0, run.run_id, "model", "digits", "first", 7, {"val/best_mse": 0.5})
    what = store, event
    for _ in range(2):  # as after a kill between the version and its alias, and once more
        assert "version 1 of digits; champion: models:/digits" in mlflow_store.register(*what)
        assert len(store.search_model_versions("name = 'digits'")) == 1
        assert champion() == "first"


def test_no_champion_yet(store: Any) -> None:
    with pytest.raises(UserError, match="cannot fetch models:/digits@champion"):
        champion()


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="without / : and quotes"):
        TrainingConfig(register="a/b")
