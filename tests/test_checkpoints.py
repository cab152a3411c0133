"""The checkpoints of a training: which are kept, found, refused, and what status.json says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from utils.cli import Stopped, UserError
from utils.distributed import Distributed
from utils.files import read_tensors
from utils.provenance import Provenance
from utils.tracking import Run
from utils.training.checkpoint import Checkpointer, checkpoints_in, find_checkpoint
from utils.training.state import CheckpointState, Progress

ABOUT = {"time": 0.0, "run_id": "a"}  # of a line in metrics.jsonl
ALONE = Distributed(0, 1, torch.device("cpu"))


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        return self.state_dict()

    def pretrained_config(self) -> dict[str, Any]:
        return {}


class Training:
    """One weight that holds the step."""

    def __init__(self, folder: Path, *, resumed: Path | None = None) -> None:
        self.net = Net()
        self.progress = Progress(run_id="run")
        state = CheckpointState(ALONE, self.net, {}, self.progress)
        state.restore(resumed)
        run = Run(folder, enabled=False)
        folder.mkdir(exist_ok=True)
        self.checkpoints = Checkpointer(run, state, Provenance(), resumed)

    def save(self, step: int, value: float | None = None) -> None:
        self.progress.step = step
        nn.init.constant_(self.net.weight, step if value is None else value)
        self.checkpoints.save()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def test_the_last_two_whole_ones_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for step in (0, 5, 10, 15):
        training.save(step)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    damage(tmp_path / "checkpoints" / "step-00000015")
    training.save(20)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-00000020"]
    training.save(25)
    assert names(tmp_path) == ["step-00000020", "step-00000025"]


def test_none_is_overwritten_unless_it_is_damaged(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(5, value=1.0)
    training.save(5, value=2.0)
    (folder,) = checkpoints_in(tmp_path)
    assert float(read_tensors(folder / "model.safetensors")["weight"]) == 1
    damage(folder)
    training.save(5, value=2.0)
    assert float(read_tensors(folder / "model.safetensors")["weight"]) == 2


def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    training = Training(tmp_path)
    training.save(5)
    training.save(10)
    old, new = checkpoints_in(tmp_path)
    assert find_checkpoint(str(tmp_path), "") == find_checkpoint("auto", str(tmp_path)) == new
    damage(new)
    assert find_checkpoint(str(tmp_path), "") == old
    assert f"warning: {new} is damaged or missing" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no intact checkpoint in .*; name another"):
        find_checkpoint(str(new), "")
    assert find_checkpoint(str(old), "") == old
    damage(old)
    for wish in ("auto", str(tmp_path)):
        with pytest.raises(UserError, match="no intact checkpoint"):
            find_checkpoint(wish, str(tmp_path))


def test_where_there_is_none(tmp_path: Path) -> None:
    assert find_checkpoint("", str(tmp_path)) is None
    assert find_checkpoint("auto", str(tmp_path)) is None
    (tmp_path / "checkpoints" / "step-00000005.tmp").mkdir(parents=True)
    assert find_checkpoint("auto", str(tmp_path)) is None
    with pytest.raises(UserError, match="--resume auto needs --output_dir"):
        find_checkpoint("auto", "")
    with pytest.raises(UserError, match="no checkpoint there"):
        find_checkpoint(str(tmp_path / "none"), "")
    Training(tmp_path).save(5)
    with pytest.raises(UserError, match="omit --output_dir elsewhere"):
        find_checkpoint(str(tmp_path), "elsewhere")


def test_going_back_puts_later_ones_aside(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(5)
    training.save(10)
    (tmp_path / "checkpoints" / "step-00000015.tmp").mkdir()
    again = Training(tmp_path, resumed=find_checkpoint(str(checkpoints_in(tmp_path)[0]), ""))
    assert names(tmp_path) == ["step-00000005", "step-00000010.abandoned"]
    assert (again.progress.step, again.net.weight.item()) == (5, 5.0)
    again.save(10, value=7.0)
    assert names(tmp_path) == ["step-00000005", "step-00000010", "step-00000010.abandoned"]


def test_what_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(5)
    with pytest.raises(UserError, match="weight has NaN or infinite values"):
        training.save(10, value=float("nan"))
    assert names(tmp_path) == ["step-00000005"]


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    training.save(5)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(UserError, match=r"No space left .*make room on the disk"):
            training.save(10)
    assert names(tmp_path) == ["step-00000005"]
    assert find_checkpoint("auto", str(tmp_path)) == checkpoints_in(tmp_path)[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, {"status": "FINISHED", "exit_code": 0}),
        (Stopped(15), {"status": "KILLED", "exit_code": 143}),
        (UserError("too hot"), {"status": "FAILED", "exit_code": 2, "error": "too hot"}),
    ],
)
def test_status(tmp_path: Path, error: BaseException | None, expected: dict) -> None:
    training = Training(tmp_path)

    def status() -> dict:
        return json.loads((tmp_path / "status.json").read_text())

    assert status()["status"] == "RUNNING"
    training.save(5)
    training.progress.step = 6
    training.checkpoints.__exit__(type(error), error, None)
    assert status().items() >= expected.items()
    assert (status()["step"], status()["run_id"]) == (6, "run")
    assert status()["checkpoint"] == str(checkpoints_in(tmp_path)[0])
