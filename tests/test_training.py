"""Schedule, batches and optimiser, and where a training writes."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from utils.cli import UserError
from utils.distributed import Distributed
from utils.training.optimizers import make_optimizer, optimizer_step
from utils.training.resume import Progress
from utils.training.schedule import (
    Schedule,
    TrainingConfig,
    find_output_dir,
)

ALONE = Distributed(0, 1, torch.device("cpu"))


def schedule(num_train: int = 100, num_val: int = 10, processes: int = 1, **flags: object):
    return Schedule(
        TrainingConfig(**{"batch_size": 10, "max_epochs": 4} | flags), num_train, num_val, processes
    )


def test_learning_rate() -> None:
    plan = schedule(1000, learning_rate=0.5, warmup_steps=20)
    rates = [plan.learning_rate(step) for step in range(plan.total_steps + 1)]
    assert plan.total_steps == 400
    assert rates[0] == pytest.approx(0.5 / 21)
    assert all(later > earlier for earlier, later in pairwise(rates[:21]))
    assert rates[20] == 0.5 == max(rates)
    assert all(later < earlier for earlier, later in pairwise(rates[20:]))
    assert rates[210] == pytest.approx(0.25)
    assert rates[305] == pytest.approx(0.25 * (1 + math.cos(math.pi * 0.75)))
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_warm_up_is_at_most_a_tenth() -> None:
    plan = schedule(warmup_steps=1000, learning_rate=1.0)
    assert [plan.learning_rate(step) for step in (3, 4)] == [0.8, 1.0]
    short = schedule(max_steps=1, learning_rate=1.0)
    assert short.learning_rate(0) == 1


def test_when_what_is_due() -> None:
    plan = schedule(205)
    assert (plan.steps_per_epoch, plan.total_steps, plan.evaluate_every) == (20, 80, 20)
    assert [step for step in range(1, 81) if plan.evaluates(step)] == [20, 40, 60, 80]
    plan = schedule(205, evaluate_every=30, max_steps=70)
    assert [step for step in range(1, 71) if plan.evaluates(step)] == [30, 60, 70]
    assert [step for step in range(1, 71) if plan.logs(step)] == [30, 50, 60, 70]
    assert schedule(205, max_steps=1000).total_steps == 80


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_train": 9}, "9 training images are too few for one batch of 10; .*--batch_size 9"),
        ({"num_train": 0}, "0 training images are too few"),
        ({"num_val": 0}, "no validation images; .*--val_fraction"),
        ({"accumulate": 3}, "10 does not divide into 1 processes x 3 parts"),
        ({"processes": 4}, "10 does not divide into 4 processes x 1 parts"),
    ],
)
def test_what_cannot_be_scheduled(arguments: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        schedule(**arguments)


@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 0},
        {"accumulate": 0},
        {"max_epochs": 0},
        {"warmup_steps": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"weight_decay": -1.0},
        {"weight_decay": math.nan},
        {"max_grad_norm": 0.0},
        {"patience": -1},
        {"nonfinite_limit": -1},
        {"checkpoint_every": "0"},
        {"checkpoint_every": "5 minutes"},
    ],
)
def test_flags_out_of_range(flags: dict) -> None:
    (name,) = flags
    with pytest.raises(ValueError, match=name):
        TrainingConfig(**flags)


def seen_rows(plan: Schedule, progress: Progress, group: Distributed = ALONE) -> list[list[int]]:
    """The rows of every batch of `group`'s process from `progress` to the end."""

    def load(batches: list[Tensor], epoch: int) -> Iterator[list[int]]:
        yield from (batch.tolist() for batch in batches)

    seen = []
    for batch in plan.batches(torch.arange(100, 125), progress, group, load):
        progress.step += 1
        assert group.shard(plan.rows).tolist() == batch
        seen.append(batch)
    return seen


def test_batches() -> None:
    seen = seen_rows(schedule(25), Progress())
    assert len(seen) == 8  # two full batches in each of four epochs
    assert all(len(set(batch)) == 10 for batch in seen)
    for epoch in range(4):
        rows = seen[2 * epoch] + seen[2 * epoch + 1]
        assert len(set(rows)) == 20
        assert set(rows) <= set(range(100, 125))
    assert len({tuple(batch) for batch in seen}) == 8
    assert {row for batch in seen for row in batch} == set(range(100, 125))
    assert seen != seen_rows(schedule(25, seed=1), Progress())
    assert len(seen_rows(schedule(25, max_steps=3), Progress())) == 3


@pytest.mark.parametrize("stop", range(9))
def test_batches_go_on_where_they_stood(stop: int) -> None:
    plan, progress = schedule(25), Progress()
    batches = plan.batches(torch.arange(100, 125), progress, ALONE, lambda rows, epoch: iter(rows))
    seen = []
    for batch in batches if stop else ():
        progress.step += 1
        seen.append(batch.tolist())
        if progress.step == stop:
            break
    seen += seen_rows(plan, Progress(**vars(progress)))
    assert seen == seen_rows(plan, Progress())


def test_processes_share_each_batch() -> None:
    shares = [
        seen_rows(schedule(25, processes=2), Progress(), Distributed(rank, 2, torch.device("cpu")))
        for rank in (0, 1)
    ]
    for left, right, whole in zip(*shares, seen_rows(schedule(25), Progress()), strict=True):
        assert len(left) == len(right) == 5
        assert sorted(left + right) == sorted(whole)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.dropout = nn.Dropout(0.5)
        self.mixer = nn.Linear(4, 4, bias=False)
        self.linear = nn.Linear(4, 1)

    def forward(self, rows: Tensor) -> Tensor:
        values = self.dropout(self.norm(self.embedding(rows % 9)))
        return self.linear(self.mixer(self.conv(values[..., None])[..., 0]))


def test_only_matrices_decay() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer = make_optimizer(net, TrainingConfig(weight_decay=0.5), (0.9, 0.99))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norm = optimizer_step(optimizer, 0.1, 1.0)
    assert norm == 0
    for name, value in net.named_parameters():
        factor = 0.95 if name in ("conv.weight", "mixer.weight", "linear.weight") else 1
        assert torch.allclose(value, before[name] * factor), name
        assert value.grad is None


def test_gradients_are_clipped_together() -> None:
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=9)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter, value in zip(net.parameters(), (2.0, 2.0), strict=True):
        parameter.grad = torch.full_like(parameter, value)
    assert optimizer_step(optimizer, 0.1, 1.0) == 4
    for parameter, old in zip(net.parameters(), before, strict=True):
        assert torch.allclose(parameter, old - 0.1 * 2 / 4, atol=1e-5)


def test_where_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_output_dir(TrainingConfig(), None, "made-up") == Path("outputs/made-up")
    named = TrainingConfig(run_name="mine")
    assert find_output_dir(named, None, "made-up") == Path("outputs/mine")
    Path("outputs/mine").mkdir(parents=True)
    assert find_output_dir(named, None, "made-up") == Path("outputs/mine-2")
    given = TrainingConfig(output_dir="here", run_name="mine")
    assert find_output_dir(given, None, "made-up") == Path("here")
    resumed = Path("there/checkpoints/step-00000003")
    assert find_output_dir(named, resumed, "made-up") == Path("there")
    Path("here/checkpoints/step-00000003").mkdir(parents=True)
    with pytest.raises(UserError, match="here holds a training already"):
        find_output_dir(given, None, "made-up")
