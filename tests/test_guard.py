"""No step is taken on numbers that are not finite: the training stops, or leaves the batch out."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TINY_TOKENIZER, write_images
from tests.test_training import make_state
from utils.cli import UserError
from utils.distributed import Distributed
from utils.training import loop
from utils.training.loop import TrainState, clip_gradients, update_weights
from utils.training.optim import make_optimizer
from vqvae import VQVAE, VQVAEConfig

ALONE = Distributed(0, 1, torch.device("cpu"))
NAMES = "row {}".format
ROWS = torch.tensor([5, 10])


def clone(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def batch(
    size: float, loss: float = 1.0, group: Distributed = ALONE, **flags: object
) -> tuple[nn.Module, TrainState, dict[str, Tensor]]:
    """A net with gradients of some size after 7 steps, and a loss."""
    net = nn.Linear(3, 1)
    state = make_state(net, group=group, weight_decay=0.1, warmup_steps=0, **flags)
    state.progress.step = 7
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, size)
    return net, state, {"loss": torch.tensor(loss)}


def test_a_finite_step_is_that_of_the_optimiser() -> None:
    net, state, values = batch(2.0)
    other = nn.Linear(3, 1)
    other.load_state_dict(net.state_dict())
    reference = make_optimizer(other, state.config, (0.9, 0.99))
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    clip_gradients(reference, 1.0)
    update_weights(reference, state.schedule.learning_rate(7))
    assert loop.optimizer_step(state, ROWS, values, NAMES)
    assert state.progress.step == 8
    assert same(net, other.state_dict())
    assert state.averages.take()["gradient_norm"] == 4
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_optimiser_may_keep_its_own_learning_rate() -> None:
    """The discriminator's was the generator's, which is near 0 in most of the adversarial phase."""
    _, state, values = batch(2.0)
    (group,) = {id(x): x for x in state.optimizers["optimizer"].param_groups[:1]}.values()
    group |= {"lr": 0.123, "scheduled": False}
    assert loop.optimizer_step(state, ROWS, values, NAMES)
    rates = [x["lr"] for x in state.optimizers["optimizer"].param_groups]
    assert rates == [0.123, state.schedule.learning_rate(7)]


@pytest.mark.parametrize(
    ("size", "loss", "named"),
    [(math.nan, 1.0, "gradient_norm nan"), (1.0, math.inf, "loss inf")],
)
def test_it_stops_before_the_step_and_says_where(size: float, loss: float, named: str) -> None:
    net, state, values = batch(size, loss)
    before = clone(net)
    with pytest.raises(UserError, match=rf"step 8: {named} at learning rate .*, in row 5, row 10;"):
        loop.optimizer_step(state, ROWS, values, NAMES)
    assert same(net, before)


def test_of_two_optimisers_none_steps_if_one_must_not() -> None:
    (good, state, values), (_, other, _) = batch(1.0), batch(math.nan)
    before = clone(good)
    state.optimizers["disc_optimizer"] = other.optimizers["optimizer"]
    with pytest.raises(UserError, match="disc_gradient_norm nan"):
        loop.optimizer_step(state, ROWS, values, NAMES)
    assert same(good, before)


def test_bad_batches_are_left_out_up_to_a_limit(capsys: pytest.CaptureFixture) -> None:
    net, state, values = batch(math.nan, on_nonfinite="skip", nonfinite_limit=2)
    before = clone(net)
    for number in (1, 2):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        assert not loop.optimizer_step(state, ROWS, values, NAMES)
        assert same(net, before)
        assert all(parameter.grad is None for parameter in net.parameters())
        assert f"skipped, {number} of 2" in capsys.readouterr().out
    assert state.progress.skipped == 2
    with pytest.raises(UserError, match="2 batches were skipped before"):
        loop.optimizer_step(state, ROWS, {"loss": torch.tensor(math.nan)}, NAMES)


def test_a_batch_left_out_leaves_no_trace_in_the_codebook() -> None:
    """Codes that are averages change in the forward pass, before any loss is computed."""
    torch.manual_seed(0)
    shape = {"image_size": (8, 8), "in_channels": 1, "channels": 8}
    codes = {"quantizer": "ema", "codebook_size": 8, "codebook_dim": 4}
    model = VQVAE(VQVAEConfig.create(**codes, **shape)).train()
    model(torch.rand(4, 1, 8, 8))
    model.quantizer.end_step()
    state = make_state(model, on_nonfinite="skip", changed_by_forward=[model.quantizer])
    images = iter([torch.full((10, 1, 8, 8), math.nan)])
    batches = loop.batches(state, None, torch.arange(100), lambda rows, epoch: images)
    rows, nan = next(batches)
    before = clone(model.quantizer)
    made, quantized = model(nan)
    model.quantizer.end_step()
    assert not same(model.quantizer, before)
    (made.mean() + sum(quantized.losses.values())).backward()
    assert not loop.optimizer_step(state, rows, {"loss": made.mean().detach()})
    assert same(model.quantizer, before)


class OfTwo(Distributed):
    """One of two processes, the other of which has a loss that is not finite."""

    def all_reduce_max(self, value: int) -> int:
        return 1

    def all_gather(self, value: list[float]) -> list[list[float]]:
        return [value, [math.inf, *value[1:]]]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_find_one_reason(rank: int) -> None:
    """Most of them found `a number of another process`; the first to fail prints the reason."""
    _, state, values = batch(1.0, group=OfTwo(rank, 2, ALONE.device))
    with pytest.raises(UserError, match=r"step 8: loss inf at learning rate .*, in row 5, row 10;"):
        loop.optimizer_step(state, ROWS, values, NAMES)


def test_rows_are_those_of_the_csv(error_of: Callable[..., str], own_folder: Path) -> None:
    """After images that were skipped all of them were too low."""
    data = write_images(own_folder / "data")
    (own_folder / "data" / "0.png").write_bytes(b"none")
    flags = ("--path_to_data", data, *TINY_TOKENIZER, "--skip_bad_images", 1, "--batch_size", 9)
    error = error_of("train_vqvae", *flags, "--learning_rate", 1e30, "--max_epochs", 99)
    named = {(int(row), file) for row, file in re.findall(r"row (\d+) (\S+\.png)", error)}
    assert len(named) == 9
    assert named < {(number + 1, f"{number}.png") for number in range(1, 12)}
