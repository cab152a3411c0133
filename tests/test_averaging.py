"""The average of the weights: what it converges to, and a checkpoint of it."""

import pytest
import torch
from torch import nn

from utils.training.config import TrainingConfig
from utils.training.optim import EMA


def test_it_follows_the_weights_and_forgets_the_first() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = EMA(model, decay=0.9)
    nn.init.constant_(model.weight, 5.0)
    expected = float(average.model.weight)
    for step in range(1, 301):
        average.update(model, step)
        decay = min(0.9, step / (step + 9))
        expected = decay * expected + (1 - decay) * 5.0
        assert float(average.model.weight) == pytest.approx(expected, rel=1e-5)
    assert float(average.model.weight) == pytest.approx(5.0, rel=1e-4)


def test_what_no_gradient_trains_is_the_latest() -> None:
    """Codes of `ema` were averaged, while the sums and counts that they are made of were not."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].requires_grad_(False)
    average = EMA(model, decay=0.9)
    for layer in model:
        nn.init.constant_(layer.weight, 5.0)
    average.update(model, 1000)
    assert float(average.model[0].weight) != 5.0
    assert float(average.model[1].weight) == 5.0


def test_without_decay_it_is_the_model_itself() -> None:
    model = nn.Linear(2, 2)
    average = EMA(model, decay=0.0)
    assert average.model is model


def test_a_resumed_average_goes_on() -> None:
    model = nn.Linear(2, 2)
    one, two = EMA(model, decay=0.5), EMA(nn.Linear(2, 2), decay=0.5)
    nn.init.ones_(model.weight)
    one.update(model, 100)
    two.model.load_state_dict(one.model.state_dict())
    torch.testing.assert_close(two.model.state_dict(), one.model.state_dict())
    with pytest.raises(ValueError, match="ema_decay"):
        TrainingConfig(ema_decay=1.0)
