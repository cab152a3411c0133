"""A training whose output folder is gone goes on from what its run left in MLflow."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import environment, open_run
from tests.forks import Forked
from tests.test_checkpoints import Net
from utils import tracking
from utils.cli import Stopped, UserError
from utils.distributed import Distributed
from utils.provenance import Provenance
from utils.training.checkpoint import Checkpointer, find_checkpoint
from utils.training.state import CheckpointState, Progress

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses
ALONE = Distributed(0, 1, torch.device("cpu"))


def train(error: Exception | None, *, steps: int = 3) -> tracking.Run:
    """A training that saves a checkpoint, unless `steps` is 0, and ends; its folder is gone."""
    run = open_run()
    state = CheckpointState(ALONE, Net(), {}, Progress(step=steps, run_id=run.run_id))
    checkpoints = Checkpointer(run, state, Provenance(), None)

    def ended() -> None:
        with run, checkpoints:
            if steps:
                checkpoints.save()
            if error is not None:
                raise error

    if error is None:
        ended()
    else:
        with pytest.raises(type(error)):
            ended()
    shutil.rmtree("out")
    return run


@pytest.mark.parametrize("error", [Stopped(15), RuntimeError("a bug")])
def test_a_training_that_did_not_finish_comes_back(store: Any, error: Exception) -> None:
    """One that failed on a machine that is gone was lost."""
    run = train(error)
    home = Path("outputs") / run.run_id
    found = find_checkpoint(run.run_id, "")
    assert found == home / "checkpoints" / "step-00000003"
    assert json.loads((found / "training.json").read_text())["progress"]["run_id"] == run.run_id
    assert find_checkpoint(run.run_id, "") == find_checkpoint(run.run_id, str(home)) == found
    other = find_checkpoint(run.run_id, "elsewhere")
    assert other == Path("elsewhere/checkpoints/step-00000003")


@pytest.mark.parametrize(("error", "steps"), [(None, 3), (UserError("no images"), 0)])
def test_one_that_left_no_checkpoint(store: Any, error: Exception | None, steps: int) -> None:
    run = train(error, steps=steps)
    with pytest.raises(UserError, match=r"left no checkpoint in MLflow: only trainings that were"):
        find_checkpoint(run.run_id, "")
    assert not Path("outputs").exists()


def test_a_folder_of_another_training_is_not_touched(store: Any) -> None:
    first = find_checkpoint(train(Stopped(15)).run_id, "there")
    with pytest.raises(UserError, match="there holds another training; name another --output_dir"):
        find_checkpoint(train(Stopped(15)).run_id, "there")
    assert [path.name for path in first.parent.iterdir()] == [first.name]


FIND = """
import sys
from utils.training.checkpoint import find_checkpoint
import mlflow
print("ready", flush=True)
sys.stdin.readline()
print(find_checkpoint(sys.argv[1], ""))
"""


def test_all_processes_of_torchrun_ask_at_once(store: Any) -> None:
    """They wrote and renamed the same folders at the same time, and failed 3 times of 3."""
    run_id = train(Stopped(15)).run_id
    processes = [
        Forked(
            *("-c", FIND, run_id),
            env=environment(MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"]),
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate() for process in processes]
    assert {out.strip() for out, _ in said} == {f"outputs/{run_id}/checkpoints/step-00000003"}, said
