"""What a GPT's sequence is made of: conditions, residual codes, and cells in random order."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.test_completion import log_likelihood
from tests.test_equalities import CODES, CONDITIONS, make_model, some_input, step_by_step
from transformer import GPT, GPTConfig, Guidance, SamplingParams, complete, generate, make_prefix
from transformer.completion import later_known_mask
from transformer.order import random_order_probability, sample_permutations
from transformer.prefix import drop_conditioning, null_prefix
from utils.data.given import keep_side

# --- conditions ----------------------------------------------------------------------------------


def test_a_prefix_is_the_class_and_the_cells_of_the_condition() -> None:
    conditions = torch.arange(8, dtype=torch.uint8).view(2, 2, 2)
    assert make_prefix(torch.tensor([1, 3]), conditions).tolist() == [
        [1, 0, 1, 2, 3],
        [3, 4, 5, 6, 7],
    ]
    model = make_model(prefix=5)
    assert (
        null_prefix(torch.ones(2, 5, dtype=torch.long), model.config).tolist()
        == [[3, 7, 7, 7, 7]] * 2
    )
    assert null_prefix(torch.ones(2, dtype=torch.long), model.config).tolist() == [3, 3]
    with pytest.raises(ValueError, match="a class and 4 cells of a condition, got 0"):
        model(torch.tensor([0]), torch.zeros(1, 4, 4, dtype=torch.long))


def test_every_cell_of_the_condition_changes_every_logit() -> None:
    model = make_model(prefix=5, window=1)
    prefix, indices = some_input(model)
    before = model(prefix, indices)
    for cell in range(1, 5):
        other = prefix.clone()
        other[:, cell] = (other[:, cell] + 1) % CONDITIONS
        assert (model(other, indices) != before).any(dim=2).all()


def test_a_condition_lies_over_the_image() -> None:
    """A cell of it and the image's cell at the same place are turned alike, at any two sizes."""
    config = {"codebook_size": 8, "dim": 32, "num_heads": 2, "num_layers": 1}
    same = GPT(
        GPTConfig(
            latent_dim=(4, 6), condition_codebook_size=5, condition_latent_dim=(4, 6), **config
        )
    )
    assert torch.equal(same.cos[1:25], same.cos[25:])
    assert torch.equal(same.sin[1:25], same.sin[25:])
    third = GPT(
        GPTConfig(
            latent_dim=(3, 9), condition_codebook_size=5, condition_latent_dim=(1, 3), **config
        )
    )
    middle = 9 + torch.tensor([1, 4, 7])  # the middle row; the middle of every three columns
    torch.testing.assert_close(third.sin[1:4], third.sin[4 + middle])


@pytest.mark.parametrize(
    ("shares", "together"),
    [
        ((0.1, 0.1), 0.05),
        ((0.2, 0.1), 0.05),  # the condition was never hidden alone
        ((0.1, 0.5), 0.05),
        ((0.1, 0.0), 0.0),
        ((0.5, 0.9), 0.4),  # as much as there is too much
    ],
    ids=str,
)
def test_shares_of_what_is_hidden(shares: tuple[float, float], together: float) -> None:
    config = make_model(prefix=5).config
    config = replace(config, class_dropout=shares[0], condition_dropout=shares[1])
    prefix = torch.ones(40_000, 5, dtype=torch.long)
    torch.manual_seed(0)
    hidden = drop_conditioning(prefix, config) != 1
    no_class, no_condition = hidden[:, 0], hidden[:, 1:]
    assert torch.equal(no_condition.any(dim=1), no_condition.all(dim=1))
    for share, expected in (
        (no_class, shares[0]),
        (no_condition[:, 0], shares[1]),
        (no_class & no_condition[:, 0], together),
    ):
        assert float(share.float().mean()) == pytest.approx(expected, abs=0.01)


def test_guidance_of_0_is_the_model_that_was_told_nothing() -> None:
    model = make_model(prefix=5)
    prefix, _ = some_input(model)
    nothing = generate(model, null_prefix(prefix, model.config))
    assert torch.equal(generate(model, prefix, guidance=Guidance(0.0)), nothing)
    assert not torch.equal(generate(model, prefix), nothing)


def test_a_condition_is_bound_to_the_size_of_the_image() -> None:
    model = make_model(prefix=5)
    with pytest.raises(ValueError, match=r"own size \(4, 4\), got \(4, 8\)"):
        generate(model, some_input(model)[0], size=(4, 8))


def test_it_learns_what_the_condition_tells() -> None:
    """Random grids that the condition names cell by cell in other words: all is known with it."""
    torch.manual_seed(0)
    grid, codes = (2, 3), 4
    grids = {"latent_dim": grid, "condition_latent_dim": grid, "condition_codebook_size": codes}
    shape = {"dim": 48, "num_heads": 2, "num_layers": 2, "dropout": 0.0}
    model = GPT(GPTConfig(codebook_size=codes, **grids, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        indices = torch.randint(codes, (64, *grid))
        prefix = make_prefix(torch.zeros(64, dtype=torch.long), codes - 1 - indices)
        loss = model(drop_conditioning(prefix, model.config), indices, loss=True).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    told = model(prefix, indices, loss=True).mean()
    not_told = model(null_prefix(prefix, model.config), indices, loss=True).mean()
    assert told.item() < 0.7 * math.log(codes)
    assert not_told.item() == pytest.approx(math.log(codes), rel=0.15)


# --- residual codes ------------------------------------------------------------------------------


def test_a_code_changes_only_what_comes_after_it() -> None:
    """Within a cell the earlier depths are known, the later ones are not."""
    model = make_model((3, 4), depth=3)
    prefix, indices = some_input(model)
    before = model(prefix, indices)
    assert before.shape == (3, 36, CODES)
    for token in (0, 7, 17, 34):
        other = indices.clone().flatten(1)
        other[:, token] = (other[:, token] + 1) % CODES
        changed = (model(prefix, other.view_as(indices)) != before).any(dim=2)
        assert not changed[:, : token + 1].any()
        assert changed[:, token + 1 :].all()


def test_the_window_counts_cells() -> None:
    grid, depth, window = (5, 6), 2, 2
    model = make_model(grid, depth=depth, window=window, num_layers=1)
    prefix, indices = some_input(model)
    before = model(prefix, indices)
    row, column = 2, 3
    indices[:, row, column, 1] = (indices[:, row, column, 1] + 1) % CODES
    changed = ((model(prefix, indices) - before).abs() > 1e-9).any(dim=2).any(dim=0)
    expected = torch.zeros(1 + 60, dtype=torch.bool)
    for i in range(row, row + window):
        for j in range(column - window + 1, column + window):
            for d in range(depth):
                if (i, j, d) >= (row, column, 1):
                    expected[(i * 6 + j) * depth + d + 1] = True  # shows in the next token
    assert changed.equal(expected[:-1])


def test_each_depth_has_words_of_its_own() -> None:
    """Codes of one depth are never mixed up with those of another, in and out."""
    model = make_model((2, 2), depth=2)
    prefix, indices = some_input(model)
    before = model(prefix, indices)
    with torch.no_grad():
        model.head.weight[CODES:] += 1
    changed = (model(prefix, indices) != before).any(dim=2)
    assert changed.tolist() == [[False, True] * 4] * 3
    with torch.no_grad():
        model.token_embedding.weight[:CODES] += 1
    assert (model(prefix, indices)[:, 0] == before[:, 0]).all()


@pytest.mark.parametrize("depth", [1, 2])
def test_the_loss_is_the_cross_entropy_also_in_parts(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model((3, 4), depth=depth)
    prefix, indices = some_input(model)
    logits = model(prefix, indices)
    expected = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none")
    for at_once in (1 << 26, 100):
        monkeypatch.setattr("transformer.head.LOGITS_AT_ONCE", at_once)
        loss = model(prefix, indices, loss=True)
        # the loss is taken in float32
        torch.testing.assert_close(loss.flatten().double(), expected, rtol=1e-5, atol=1e-5)
        gradient = torch.autograd.grad(loss.sum(), model.head.weight)[0]
        wanted = torch.autograd.grad(expected.sum(), model.head.weight, retain_graph=True)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_completion_of_residual_codes_with_conditions() -> None:
    model = make_model((4, 4), depth=2, prefix=5)
    prefix, given = some_input(model, 4)
    keep = keep_side("left:0.5", (4, 4))
    one = complete(model, prefix, given, keep)
    many = complete(model, prefix, given, keep, candidates=6, batch_size=5)
    for drawn in (one, many):
        assert drawn.shape == given.shape
        assert torch.equal(drawn[:, keep], given[:, keep])
    scores = [
        log_likelihood(model, prefix, drawn, later_known_mask(keep)).sum() for drawn in (one, many)
    ]
    assert scores[1] > scores[0]


# --- random order --------------------------------------------------------------------------------


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
    """Logits of cell pi(t) depend on the cells pi(< t), on all of them, and on no other."""
    model = make_model((3, 3), depth=depth, prefix=5, positions=positions, order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model)
    torch.manual_seed(4)
    order = sample_permutations(indices, 1.0)
    before = model(prefix, indices, order=order)
    for cell in range(9):
        other = indices.clone().flatten(1, 2)
        other[:, cell] = (other[:, cell] + 1) % CODES
        after = model(prefix, other.view_as(indices), order=order)
        changed = (after != before).any(dim=2).view(3, 9, depth)
        for row in range(3):
            place = order[row].tolist().index(cell)
            assert not changed[row, :place].any()
            assert not changed[row, place, 0]
            assert changed[row, place + 1 :].all()


def test_a_permuted_loss_is_that_of_the_permuted_cells() -> None:
    model = make_model((3, 3), depth=2, order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model)
    order = sample_permutations(indices, 1.0)
    logits = model(prefix, indices, order=order)
    targets = torch.stack(
        [grid.flatten(0, 1)[turn] for grid, turn in zip(indices, order, strict=True)]
    )
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = model(prefix, indices, order=order, loss=True)
    torch.testing.assert_close(loss.flatten().double(), expected, rtol=1e-5, atol=1e-5)


def test_position_and_target_are_told_in_any_order() -> None:
    """Without the target, who has seen the same cells could not know which one is asked for."""
    model = make_model((2, 2), order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model, 1)
    orders = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3]])
    one, two = model(prefix.repeat(2), indices.repeat(2, 1, 1), order=orders)
    torch.testing.assert_close(one[0], two[0])
    assert (one[1] - two[1]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("depth", [1, 2])
def test_in_raster_order_it_draws_as_it_was_trained(depth: int, positions: str) -> None:
    model = make_model((3, 4), depth=depth, prefix=5, positions=positions, order_anneal=(0.5, 0.75))
    prefix, indices = some_input(model)
    with torch.inference_mode():
        whole = model(prefix, indices)
        raster = model(prefix, indices, order=torch.arange(12).expand(3, -1))
    torch.testing.assert_close(raster, whole)
    cached = step_by_step(model, prefix, indices, model.make_cache(3))
    torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-10)
    drawn = generate(model, prefix, params=SamplingParams(0))
    assert torch.equal(model(prefix, drawn).argmax(dim=2), drawn.flatten(1))


def test_what_random_orders_do_not_go_with() -> None:
    with pytest.raises(ValueError, match="order_anneal needs window_size 0, got 3"):
        GPTConfig(8, window_size=3, order_anneal=(0.5, 0.75))
    for wrong in ((0.8, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="order_anneal must rise"):
            GPTConfig(8, order_anneal=wrong)
    model = make_model()
    prefix, indices = some_input(model)
    with pytest.raises(ValueError, match="only a GPT with order_anneal"):
        model(prefix, indices, order=sample_permutations(indices, 1.0))
    model = make_model(order_anneal=(0.5, 0.75))
    with pytest.raises(ValueError, match="neither be extrapolated"):
        model(prefix, torch.zeros(3, 5, 5, dtype=torch.long), position_extension="extrapolate")
