"""A training that goes on from a checkpoint is the one that never stopped, or it is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from utils.cli import Flags, UserError
from utils.distributed import Distributed
from utils.provenance import Provenance
from utils.tracking import Run
from utils.training.checkpoint import Checkpointer, continue_training, find_checkpoint
from utils.training.config import TrainingConfig
from utils.training.loop import Schedule, TrainState, batches, optimizer_step
from utils.training.optim import make_optimizer
from utils.training.state import CheckpointState, Progress, fingerprint

ALONE = Distributed(0, 1, torch.device("cpu"))
SETTINGS = {"data_sha256": "abc", "num_workers": 2}


class Net(nn.Module):
    """Dropout draws from torch; the weights that decay and those that do not have two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 1)

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        return self.state_dict()

    def pretrained_config(self) -> dict[str, int]:
        return {"size": 4}

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(self.embedding(rows % 9))))


def train(
    folder: Path, steps: int, resumed: Path | None = None, **settings: object
) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """A training up to `steps`: what it drew and its losses, its weights, its means."""
    torch.manual_seed(3 if resumed is None else 99)
    net, counts = Net(), torch.zeros(2)
    config = TrainingConfig(batch_size=10, max_epochs=4, seed=1, ema_decay=0.5)
    optimizers = {"optimizer": make_optimizer(net, config, (0.9, 0.99))}
    parts, plan = {"counts": counts, "absent": None}, Schedule(config, 25, 5)
    state = TrainState(config, plan, ALONE, net, optimizers, SETTINGS | settings, 1, parts)
    state.checkpoint.restore(resumed)
    run = Run(folder, enabled=False)
    checkpoints = Checkpointer(run, state.checkpoint, Provenance(), resumed)
    seen = []
    load = lambda rows, epoch: iter(rows)  # noqa: E731
    for numbers, rows in batches(state, checkpoints, torch.arange(25), load):
        loss = (net(rows) - rows[:, None]).square().mean()
        loss.backward()
        draws = {"draw": torch.rand(())}
        optimizer_step(state, numbers, {"loss": loss.detach(), **draws})
        counts[state.progress.step % 2] += 1
        seen += [loss.item(), *map(float, draws.values())]
        state.progress.best = min(state.progress.best, loss.item())
        if state.progress.step == steps:
            break
    checkpoints.save()
    means = state.averages.take() | {"counts": counts.tolist(), "best": state.progress.best}
    del means["steps_per_second"]
    average = {f"average.{name}": x for name, x in state.ema.model.state_dict().items()}
    return seen, net.state_dict() | average, means


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, steps: int) -> None:
    expected, weights, means = train(tmp_path / "whole", 8)
    first, _, _ = train(tmp_path / "parts", steps)
    found = find_checkpoint(str(tmp_path / "parts"), "")
    second, resumed, again = train(tmp_path / "parts", 8, found)
    assert first + second == expected
    assert 0 < len(first) < len(expected)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert again == means


def test_what_makes_another_training_is_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, 1)
    found = find_checkpoint("auto", str(tmp_path))
    with pytest.raises(
        UserError, match=r"another training: the rows of a.csv \(SHA-256 abc -> x{12}\)"
    ):
        train(tmp_path, 2, found, data_sha256="x" * 64, path_to_data="a.csv")
    with pytest.raises(UserError, match=r"seed 1 -> 2"):
        train(tmp_path, 2, found, seed=2)


def test_what_may_differ_is_warned_of_or_free(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(tmp_path, 1)
    found = find_checkpoint("auto", str(tmp_path))
    train(tmp_path, 2, found, num_workers=7)
    assert "warning" not in capsys.readouterr().err
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(tmp_path, 2, found, learning_rate=0.1)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err
    assert "warning: resuming with changed settings; the result will differ from an unin" in said
    assert f"learning_rate 0.001 -> 0.1, threads {threads} -> {threads + 1}" in said


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    train(tmp_path, 1)
    found = find_checkpoint("auto", str(tmp_path))
    other = nn.Linear(3, 3)
    state = CheckpointState(
        ALONE, other, SETTINGS | {"width": 3, "seed": 1, "batch_size": 10}, Progress()
    )
    with pytest.raises(UserError, match=r"does not fit this training: .*flags.*width None -> 3"):
        state.restore(found)
    (found / "sha256.json").unlink()
    (found / "training.json").write_text('{"progress": {"steps": 3}}')
    with pytest.raises(UserError, match=r"'steps' is unknown"):
        CheckpointState(ALONE, Net(), {}, Progress()).restore(found)


def test_a_fingerprint_is_of_rows_and_arrays() -> None:
    rows = [("a.png", "cat", ""), ("b.png", "dog", "")]
    prints = {
        fingerprint(rows),
        fingerprint(rows[::-1]),
        fingerprint([("a.png", "dog", ""), ("b.png", "dog", "")]),
        fingerprint(rows, torch.zeros(3)),
        fingerprint(rows, torch.ones(3)),
    }
    assert len(prints) == 5
    assert fingerprint(list(rows)) in prints
    assert fingerprint(iter(rows), torch.ones(6)[::2]) in prints


def test_the_number_of_threads_is_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the machine's number of cores otherwise, and results depend on it."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        train(tmp_path, 1)
        for variable, found in (("3", threads), (None, threads + 1)):  # a user's choice counts
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if variable:
                monkeypatch.setenv("OMP_NUM_THREADS", variable)
            torch.set_num_threads(threads)
            flags = Flags(resume=str(tmp_path), output_dir="", path_to_data="data")
            flags.given = frozenset()
            continue_training(flags)
            assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(threads)
