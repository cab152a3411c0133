"""Schedule, batches and optimiser, and where a training writes."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer import GPT, GPTConfig
from utils.cli import UserError
from utils.distributed import Distributed
from utils.training.checkpoint import find_output_dir
from utils.training.config import TrainingConfig
from utils.training.loop import (
    Schedule,
    TrainState,
    batches,
    checkpoint_activations,
    clip_gradients,
    end_step,
    keep_best,
    update_weights,
)
from utils.training.optim import make_optimizer
from utils.training.state import Progress, StopSignals
from vqvae import VQVAE, VQVAEConfig

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
    assert [step for step in range(1, 71) if plan.logs(step)] == [50]
    assert schedule(205, max_steps=1000).total_steps == 1000


def test_the_default_length_is_20_epochs_and_enough_steps() -> None:
    """500 images made 140 steps, in which nothing is learned."""
    small, large = (Schedule(TrainingConfig(batch_size=10), count, 10) for count in (100, 10_000))
    assert (small.total_steps, small.evaluate_every) == (1000, 50)
    assert (large.total_steps, large.evaluate_every) == (20_000, 1000)
    assert Schedule(TrainingConfig(batch_size=10, max_epochs=3), 100, 10).total_steps == 30


@pytest.mark.parametrize(("last", "fast"), [(0.5, True), (0.95, False)])
def test_a_training_that_ends_while_it_improves_fast_says_so(
    last: float, fast: bool, capsys: pytest.CaptureFixture
) -> None:
    state = make_state(max_steps=4)
    for step, score in enumerate((2.0, 1.0, 0.97, last), 1):
        state.progress.step = step
        keep_best(state, Counter(state), score)
        end_step(state, Counter(state), StopSignals(print), evaluated=True)
    said = capsys.readouterr().out
    assert ("mse improved by 50% in the second half" in said) == fast
    assert ("--max_steps 8" in said) == fast


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_train": 9}, "9 training images are too few for one batch of 10; .*--batch_size 9"),
        ({"num_train": 0}, "0 training images are too few"),
        ({"num_val": 0}, "no validation images; .*--val_fraction"),
        ({"accumulate": 3}, "10 does not divide into 1 processes x 3 micro"),
        ({"processes": 4}, "10 does not divide into 4 processes x 1 micro"),
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
        {"max_epochs": -1},
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


def make_state(
    net: nn.Module | None = None,
    plan: Schedule | None = None,
    group: Distributed = ALONE,
    changed_by_forward: Sequence[nn.Module] = (),
    **flags: object,
) -> TrainState:
    """A training of 100 rows in batches of 10, or as `plan` says."""
    config = TrainingConfig(**{"batch_size": 10, "max_epochs": 4} | flags)
    net = nn.Linear(1, 1) if net is None else net
    optimizers = {"optimizer": make_optimizer(net, config, (0.9, 0.99))}
    plan = plan or Schedule(config, 100, 10)
    return TrainState(config, plan, group, net, optimizers, changed_by_forward=changed_by_forward)


def seen_rows(
    plan: Schedule, progress: Progress | None = None, group: Distributed = ALONE, **flags: object
) -> list[list[int]]:
    """The rows of every batch of `group`'s process from `progress` to the end."""
    state = make_state(plan=plan, group=group, **flags)
    vars(state.progress).update(vars(progress or Progress()))
    seen = []
    load = lambda batches, epoch: (batch.tolist() for batch in batches)  # noqa: E731
    for rows, batch in batches(state, None, torch.arange(100, 125), load):
        state.progress.step += 1
        assert group.shard(rows).tolist() == batch
        seen.append(batch)
    return seen


def test_batches() -> None:
    seen = seen_rows(schedule(25))
    assert len(seen) == 8  # two full batches in each of four epochs
    assert all(len(set(batch)) == 10 for batch in seen)
    for epoch in range(4):
        rows = seen[2 * epoch] + seen[2 * epoch + 1]
        assert len(set(rows)) == 20
        assert set(rows) <= set(range(100, 125))
    assert len({tuple(batch) for batch in seen}) == 8
    assert {row for batch in seen for row in batch} == set(range(100, 125))
    assert seen != seen_rows(schedule(25), seed=1)
    assert len(seen_rows(schedule(25, max_steps=3))) == 3


@pytest.mark.parametrize("stop", range(9))
def test_batches_go_on_where_they_stood(stop: int) -> None:
    state, seen = make_state(plan=schedule(25)), []
    rest = batches(state, None, torch.arange(100, 125), lambda rows, epoch: iter(rows))
    for _, batch in rest if stop else ():
        state.progress.step += 1
        seen.append(batch.tolist())
        if state.progress.step == stop:
            break
    assert seen + seen_rows(schedule(25), state.progress) == seen_rows(schedule(25))


def test_processes_share_each_batch() -> None:
    groups = [Distributed(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    shares = [seen_rows(schedule(25, processes=2), group=group) for group in groups]
    for left, right, whole in zip(*shares, seen_rows(schedule(25)), strict=True):
        assert len(left) == len(right) == 5
        assert sorted(left + right) == sorted(whole)


class Counter:
    """Stands for the checkpointer: the steps at which it saved."""

    def __init__(self, state: TrainState) -> None:
        self.state, self.steps, self.best = state, [], []

    def save(self) -> None:
        self.steps.append(self.state.progress.step)

    def save_model(self, model: nn.Module) -> None:
        self.best.append(self.state.progress.step)


@pytest.mark.parametrize(("every", "expected"), [("", [9]), ("4", [4, 8, 9]), ("5m", [3, 6, 9])])
def test_when_a_checkpoint_is_due(
    every: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 100 seconds here; after step 9 comes an evaluation."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    state = make_state(checkpoint_every=every)
    checkpoints, stop = Counter(state), StopSignals(print)
    for step in range(1, 10):
        state.progress.step, now[0] = step, 100.0 * step
        assert not end_step(state, checkpoints, stop, evaluated=step == 9)
    assert checkpoints.steps == expected


def test_the_best_is_kept_and_patience_ends_a_training(capsys: pytest.CaptureFixture) -> None:
    state = make_state(patience=2)
    checkpoints, stop, ended = Counter(state), StopSignals(print), []
    for step, score in enumerate((3.0, 2.0, 2.0, math.nan)):
        state.progress.step = step
        keep_best(state, checkpoints, score)
        ended.append(end_step(state, checkpoints, stop, evaluated=True))
    assert checkpoints.best == [0, 1]
    assert ended == [False, False, False, True]
    assert "no better mse in 2 evaluations: stopping" in capsys.readouterr().out
    keep_best(state, checkpoints, 9.0, always=True)
    assert checkpoints.best == [0, 1, 3]
    assert not end_step(state, checkpoints, stop, evaluated=True)
    assert state.progress.best == 2  # after NaN nothing was ever better


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
    norm = clip_gradients(optimizer, 1.0)
    update_weights(optimizer, 0.1)
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
    assert clip_gradients(optimizer, 1.0) == 4
    update_weights(optimizer, 0.1)
    for parameter, old in zip(net.parameters(), before, strict=True):
        assert torch.allclose(parameter, old - 0.1 * 2 / 4, atol=1e-5)


def test_where_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_output_dir("", None, "mine") == Path("outputs/mine")
    assert find_output_dir("", None, "mine") == Path("outputs/mine-2")
    assert find_output_dir("here", None, "mine") == Path("here")
    resumed = Path("there/checkpoints/step-00000003")
    assert find_output_dir("", resumed, "mine") == Path("there")
    Path("here/checkpoints/step-00000003").mkdir(parents=True)
    with pytest.raises(UserError, match="here holds a training already"):
        find_output_dir("here", None, "mine")


def gpt_loss() -> tuple[nn.Module, Callable[[], Tensor]]:
    config = GPTConfig(16, latent_dim=(2, 2), num_layers=2, num_heads=2, dim=16, dropout=0.5)
    model, grids = GPT(config), torch.arange(8).view(2, 2, 2)
    return model, lambda: model.loss(torch.zeros(2, dtype=torch.long), grids).mean()


def tokenizer_loss() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = VQVAE(VQVAEConfig(image_size=(8, 8), in_channels=1, channels=16, dropout=0.5))
    images = torch.rand(2, 1, 8, 8)
    return model, lambda: model(images).reconstruction.square().mean()


@pytest.mark.parametrize("make", [gpt_loss, tokenizer_loss])
def test_activations_computed_again_change_no_gradient(
    make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]],
) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, loss = make()
        if checkpointed:
            checkpoint_activations(model)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x
        ):
            value = loss()
        value.backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        found.append((sum(kept), gradients))
    (most, expected), (fewer, gradients) = found
    assert fewer < 0.8 * most
    assert all(map(torch.equal, gradients, expected))
