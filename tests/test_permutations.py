"""Permuted sequences: a proper factorisation of the likelihood, for training in random orders."""

import pytest
import torch
import torch.nn.functional as F

from tests.test_kv_cache import CODES, make_model, some_input, step_by_step
from transformer import GPTConfig, SamplingParams
from transformer.rope import random_order_probability, sample_permutations
from transformer.sampling import generate


def test_the_share_of_random_orders_falls_from_1_to_0() -> None:
    shares = [random_order_probability((0.5, 0.75), progress / 8) for progress in range(9)]
    assert shares == [1, 1, 1, 1, 1, 0.5, 0, 0, 0]
    assert [random_order_probability((0.0, 1.0), x) for x in (0.0, 0.25, 1.0)] == [1, 0.75, 0]
    assert [random_order_probability((0.5, 0.5), x) for x in (0.4, 0.5)] == [1, 0]


def test_orders_are_permutations_of_which_a_share_is_random() -> None:
    torch.manual_seed(0)
    orders = sample_permutations(torch.zeros(2000, 3, 3), 0.3)
    raster = torch.arange(9)
    assert torch.equal(orders.sort(dim=1).values, raster.expand(2000, -1))
    assert float((orders != raster).any(dim=1).float().mean()) == pytest.approx(0.3, abs=0.04)
    assert torch.equal(sample_permutations(torch.zeros(5, 3, 3, 2), 0.0), raster.expand(5, -1))
    first = torch.bincount(sample_permutations(torch.zeros(9000, 3, 3), 1.0)[:, 0], minlength=9)
    assert first.min() > 850


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_permuted_likelihood_is_a_proper_factorisation(depth: int, positions: str) -> None:
    """Logits of position pi(t) depend on the positions pi(< t), on all of them, and on no other."""
    model = make_model((3, 3), depth=depth, prefix=5, positions=positions, order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model)
    torch.manual_seed(4)
    order = sample_permutations(indices, 1.0)
    before = model.logits(prefix, indices, order)
    for position in range(9):
        other = indices.clone().flatten(1, 2)
        other[:, position] = (other[:, position] + 1) % CODES
        after = model.logits(prefix, other.view_as(indices), order)
        changed = (after != before).any(dim=2).view(3, 9, depth)
        for row in range(3):
            place = order[row].tolist().index(position)
            assert not changed[row, :place].any()
            assert not changed[row, place, 0]
            assert changed[row, place + 1 :].all()


def test_a_permuted_loss_is_that_of_the_permuted_positions() -> None:
    model = make_model((3, 3), depth=2, order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model)
    order = sample_permutations(indices, 1.0)
    logits = model.logits(prefix, indices, order)
    targets = torch.stack(
        [grid.flatten(0, 1)[turn] for grid, turn in zip(indices, order, strict=True)]
    )
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = model.loss(prefix, indices, order)
    torch.testing.assert_close(loss.flatten().double(), expected, rtol=1e-5, atol=1e-5)


def test_position_and_target_are_told_in_any_order() -> None:
    """Without the target, who has seen the same positions could not know which one is asked for."""
    model = make_model((2, 2), order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model, 1)
    orders = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3]])
    one, two = model.logits(prefix.repeat(2), indices.repeat(2, 1, 1), order=orders)
    torch.testing.assert_close(one[0], two[0])
    assert (one[1] - two[1]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("depth", [1, 2])
def test_in_raster_order_it_draws_as_it_was_trained(depth: int, positions: str) -> None:
    model = make_model((3, 4), depth=depth, prefix=5, positions=positions, order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model)
    with torch.inference_mode():
        whole = model.logits(prefix, indices)
        raster = model.logits(prefix, indices, order=torch.arange(12).expand(3, -1))
    torch.testing.assert_close(raster, whole)
    cached = step_by_step(model, prefix, indices, model.make_cache(3))
    torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-10)
    sampled = generate(model, prefix, params=SamplingParams(temperature=0))
    assert torch.equal(model.logits(prefix, sampled).argmax(dim=2), sampled.flatten(1))


def test_what_random_orders_do_not_go_with() -> None:
    with pytest.raises(ValueError, match="order_anneal needs window_size 0"):
        GPTConfig(8, window_size=3, order_anneal=(0.5, 0.75))
    for wrong in ((0.8, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="order_anneal must"):
            GPTConfig(8, order_anneal=wrong)
    model = make_model()
    prefix, indices = some_input(model)
    with pytest.raises(ValueError, match="only a GPT with order_anneal"):
        model.logits(prefix, indices, order=sample_permutations(indices, 1.0))
