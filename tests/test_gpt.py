"""The GPT: causality, the window through one layer, the cache, initialisation, learning."""

import math

import pytest
import torch
import torch.nn.functional as F

from transformer import GPT, GPTConfig
from transformer.positions import Places, PositionExtension, rotate

GRID = (6, 7)
VARIANTS = [
    {"positions": positions, "window_size": window}
    for positions in ("rotary", "learned")
    for window in (0, 3)
]


def make_gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    values = {
        "codebook_size": 11,
        "num_classes": 3,
        "latent_dim": GRID,
        "num_layers": 2,
        "num_heads": 2,
        "dim": 32,
    }
    model = GPT(GPTConfig(**values | changes))
    for parameter in model.parameters():  # away from the tame start, so that differences show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def some_indices(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.arange(batch) % 4, torch.randint(0, 11, (batch, *GRID), generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_changes_nothing(variant: dict) -> None:
    model = make_gpt(**variant)
    prefix, indices = some_indices()
    before = model(prefix, indices)
    cell = 20
    indices.flatten(1)[:, cell] = (indices.flatten(1)[:, cell] + 1) % 11
    after = model(prefix, indices)
    torch.testing.assert_close(after[:, : cell + 1], before[:, : cell + 1])
    assert (after[:, cell + 1] != before[:, cell + 1]).any()


def test_one_layer_sees_its_window_and_the_prefix() -> None:
    window = 2
    model = make_gpt(num_layers=1, window_size=window)
    prefix, indices = some_indices()
    before = model(prefix, indices)
    row, column = 2, 3
    indices[:, row, column] = (indices[:, row, column] + 1) % 11
    changed = (model(prefix, indices) - before).abs().amax(dim=(0, 2)) > 1e-5
    expected = torch.zeros(GRID, dtype=torch.bool).flatten()
    for i in range(row, row + window):
        for j in range(column - window + 1, column + window):
            if (i, j) >= (row, column):
                expected[i * GRID[1] + j + 1] = True  # what a cell sees shows in the next one
    assert changed.equal(expected)
    assert ((model((prefix + 1) % 4, indices) - before).abs().amax(dim=(0, 2)) > 1e-5).all()


def test_the_first_loss_is_that_of_a_guess() -> None:
    model = GPT(GPTConfig(codebook_size=11, latent_dim=GRID, dim=32))
    prefix, indices = some_indices()
    loss = F.cross_entropy(model(prefix * 0, indices).flatten(0, 1), indices.flatten())
    assert loss.item() == pytest.approx(math.log(11), rel=1e-6)


def test_residual_branches_start_smaller_in_deeper_models() -> None:
    config = {"codebook_size": 11, "latent_dim": GRID, "dim": 64}
    spread = {
        layers: GPT(GPTConfig(num_layers=layers, **config)).blocks[0].feed_forward.out.weight.std()
        for layers in (1, 16)
    }
    assert float(spread[1] / spread[16]) == pytest.approx(4, rel=0.05)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    """<R_a q, R_b k> is a function of the difference of the two cells, in rows and columns."""
    height, width, dim = 6, 8, 16
    cos, sin = Places((height, width), (height, width), dim, PositionExtension.SLIDE).cells(
        0, height
    )
    q, k = torch.randn(2, dim)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        x, y = a[0] * width + a[1], b[0] * width + b[1]
        return float(rotate(q, cos[x], sin[x]) @ rotate(k, cos[y], sin[y]))

    assert score((1, 2), (3, 5)) == pytest.approx(score((2, 4), (4, 7)), abs=1e-4)
    assert score((1, 2), (3, 5)) != pytest.approx(score((1, 2), (5, 3)), abs=1e-2)
    model = make_gpt()
    assert rotate(q, model.cos[0, :1], model.sin[0, :1]).equal(q)  # the prefix is nowhere


def test_it_learns_a_rule_of_rows_and_columns() -> None:
    """Every cell repeats the one above it: only the first row has any information."""
    torch.manual_seed(0)
    grid = (5, 4)
    model = GPT(
        GPTConfig(codebook_size=8, latent_dim=grid, dim=48, num_heads=2, num_layers=2, dropout=0.0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        indices = torch.randint(0, 8, (32, 1, 4)).expand(-1, *grid)
        logits = model(torch.zeros(32, dtype=torch.long), indices)
        loss = F.cross_entropy(logits.flatten(0, 1), indices.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.2 * math.log(8) / grid[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 30},
        {"window_size": -1},
        {"dropout": 1.0},
        {"positions": "sine"},
        {"codebook_size": 1},
        {"latent_dim": (0, 3)},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{"codebook_size": 8, **wrong})


def test_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(6, 7\), got \(7, 6\)"):
        make_gpt()(torch.zeros(1, dtype=torch.long), torch.zeros(1, 7, 6, dtype=torch.long))
