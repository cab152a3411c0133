"""The GPT: causality, the window through one layer, the cache, initialisation, learning."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_kv_cache import CODES, CONDITIONS, make_model, some_input
from tests.test_sampling import log_likelihood
from transformer import GPT, GPTConfig, SamplingParams, make_prefix
from transformer.rope import GridPositions, rotary_cos_sin, rotate
from transformer.sampling import complete, generate, later_known_mask
from utils.data.masks import region_mask

GRID = (6, 7)
VARIANTS = [
    {"positions": positions, "window_size": window}
    for positions in ("both", "rotary", "learned")
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
    before = model.logits(prefix, indices)
    position = 20
    indices.flatten(1)[:, position] = (indices.flatten(1)[:, position] + 1) % 11
    after = model.logits(prefix, indices)
    torch.testing.assert_close(after[:, : position + 1], before[:, : position + 1])
    assert (after[:, position + 1] != before[:, position + 1]).any()


def test_one_layer_sees_its_window_and_the_prefix() -> None:
    window = 2
    model = make_gpt(num_layers=1, window_size=window)
    prefix, indices = some_indices()
    before = model.logits(prefix, indices)
    row, column = 2, 3
    indices[:, row, column] = (indices[:, row, column] + 1) % 11
    changed = (model.logits(prefix, indices) - before).abs().amax(dim=(0, 2)) > 1e-5
    expected = torch.zeros(GRID, dtype=torch.bool).flatten()
    for i in range(row, row + window):
        for j in range(column - window + 1, column + window):
            if (i, j) >= (row, column):
                expected[i * GRID[1] + j + 1] = True  # a logit depends on the position before it
    assert changed.equal(expected)
    assert ((model.logits((prefix + 1) % 4, indices) - before).abs().amax(dim=(0, 2)) > 1e-5).all()


def test_the_first_loss_is_that_of_a_guess() -> None:
    model = GPT(GPTConfig(codebook_size=11, latent_dim=GRID, dim=32))
    prefix, indices = some_indices()
    loss = F.cross_entropy(model.logits(prefix * 0, indices).flatten(0, 1), indices.flatten())
    assert loss.item() == pytest.approx(math.log(11), rel=1e-6)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    """<R_a q, R_b k> is a function of the difference of two positions, in rows and columns."""
    q, k = torch.randn(2, 16)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        coordinates = GridPositions((6, 8), (6, 8)).coordinates(torch.tensor([a, b]))
        cos, sin = rotary_cos_sin(coordinates, 16, 100.0)
        return float(rotate(q, cos[0], sin[0]) @ rotate(k, cos[1], sin[1]))

    assert score((1, 2), (3, 5)) == pytest.approx(score((2, 4), (4, 7)), abs=1e-4)
    assert score((1, 2), (3, 5)) != pytest.approx(score((1, 2), (5, 3)), abs=1e-2)
    cos, sin = rotary_cos_sin(torch.zeros(1, 2), 16, 100.0)  # of the class
    assert rotate(q, cos[0], sin[0]).equal(q)


def test_it_learns_a_rule_of_rows_and_columns() -> None:
    """Every position repeats the one above it: only the first row has any information."""
    torch.manual_seed(0)
    grid = (5, 4)
    model = GPT(
        GPTConfig(codebook_size=8, latent_dim=grid, dim=48, num_heads=2, num_layers=2, dropout=0.0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        indices = torch.randint(0, 8, (32, 1, 4)).expand(-1, *grid)
        logits = model.logits(torch.zeros(32, dtype=torch.long), indices)
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
        make_gpt().logits(torch.zeros(1, dtype=torch.long), torch.zeros(1, 7, 6, dtype=torch.long))


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any tensor made under it holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def test_the_loss_in_parts_is_the_whole_one_and_logits_never_stand_whole() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(16_384, latent_dim=(16, 16), num_layers=1, num_heads=1, dim=16))
    model.eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    prefix = torch.zeros(24, dtype=torch.long)
    indices = torch.randint(16_384, (24, 16, 16))
    logits = model.logits(prefix, indices)
    expected = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none")
    weights = torch.rand_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    with Largest() as largest:
        nats = model.loss(prefix, indices)
        gradients = torch.autograd.grad((nats.flatten() * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(nats.flatten(), expected)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)
    assert largest.numbers < 0.6 * logits.numel()


# --- conditions ----------------------------------------------------------------------------------


def test_a_prefix_is_the_class_and_the_cells_of_the_condition() -> None:
    conditions = torch.arange(8, dtype=torch.uint8).view(2, 2, 2)
    assert make_prefix(torch.tensor([1, 3]), conditions).tolist() == [
        [1, 0, 1, 2, 3],
        [3, 4, 5, 6, 7],
    ]
    model = make_model(prefix=5)
    assert (
        model.config.null_prefix(torch.ones(2, 5, dtype=torch.long)).tolist()
        == [[3, 7, 7, 7, 7]] * 2
    )
    of_a_class = make_model().config
    assert of_a_class.null_prefix(torch.ones(2, dtype=torch.long)).tolist() == [3, 3]
    with pytest.raises(ValueError, match="must have P = 5, got 1"):
        model.logits(torch.tensor([0]), torch.zeros(1, 4, 4, dtype=torch.long))


def test_every_position_of_the_condition_changes_every_logit() -> None:
    model = make_model(prefix=5, window=1)
    prefix, indices = some_input(model)
    before = model.logits(prefix, indices)
    for position in range(1, 5):
        other = prefix.clone()
        other[:, position] = (other[:, position] + 1) % CONDITIONS
        assert (model.logits(other, indices) != before).any(dim=2).all()


def test_a_condition_lies_over_the_image() -> None:
    """A position of it and the same one of the image have equal rotary angles, at any two sizes."""
    same = GridPositions((4, 6), (4, 6))
    image = same.coordinates(same.raster())
    torch.testing.assert_close(same.aligned_positions((4, 6), image.device), image)
    wide = GridPositions((3, 9), (3, 9))
    image = wide.coordinates(wide.raster()).view(3, 9, 2)
    # The middle row; the middle of every three columns.
    torch.testing.assert_close(wide.aligned_positions((1, 3), image.device), image[1, 1::3])


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
    hidden = config.drop_conditioning(prefix) != 1
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
    nothing = generate(model, model.config.null_prefix(prefix))
    assert torch.equal(generate(model, prefix, params=SamplingParams(guidance_scale=0.0)), nothing)
    assert not torch.equal(generate(model, prefix), nothing)


def test_a_condition_is_bound_to_the_size_of_the_image() -> None:
    model = make_model(prefix=5)
    with pytest.raises(ValueError, match=r"must be \(4, 4\), got \(4, 8\)"):
        generate(model, some_input(model)[0], size=(4, 8))


def test_it_learns_what_the_condition_tells() -> None:
    """Random grids that the condition determines, index by index."""
    torch.manual_seed(0)
    grid, codes = (2, 3), 4
    grids = {"latent_dim": grid, "condition_latent_dim": grid, "condition_codebook_size": codes}
    shape = {"dim": 48, "num_heads": 2, "num_layers": 2, "dropout": 0.0}
    model = GPT(GPTConfig(codebook_size=codes, **grids, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        indices = torch.randint(codes, (64, *grid))
        prefix = make_prefix(torch.zeros(64, dtype=torch.long), codes - 1 - indices)
        loss = model.loss(model.config.drop_conditioning(prefix), indices).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    told = model.loss(prefix, indices).mean()
    not_told = model.loss(model.config.null_prefix(prefix), indices).mean()
    assert told.item() < 0.7 * math.log(codes)
    assert not_told.item() == pytest.approx(math.log(codes), rel=0.15)


# --- residual codes ------------------------------------------------------------------------------


def test_a_code_changes_only_what_comes_after_it() -> None:
    """Within a position the earlier depths are known, the later ones are not."""
    model = make_model((3, 4), depth=3)
    prefix, indices = some_input(model)
    before = model.logits(prefix, indices)
    assert before.shape == (3, 36, CODES)
    for token in (0, 7, 17, 34):
        other = indices.clone().flatten(1)
        other[:, token] = (other[:, token] + 1) % CODES
        changed = (model.logits(prefix, other.view_as(indices)) != before).any(dim=2)
        assert not changed[:, : token + 1].any()
        assert changed[:, token + 1 :].all()


def test_the_window_counts_cells() -> None:
    grid, depth, window = (5, 6), 2, 2
    model = make_model(grid, depth=depth, window=window, num_layers=1)
    prefix, indices = some_input(model)
    before = model.logits(prefix, indices)
    row, column = 2, 3
    indices[:, row, column, 1] = (indices[:, row, column, 1] + 1) % CODES
    changed = ((model.logits(prefix, indices) - before).abs() > 1e-9).any(dim=2).any(dim=0)
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
    before = model.logits(prefix, indices)
    with torch.no_grad():
        model.head.weight[CODES:] += 1
    changed = (model.logits(prefix, indices) != before).any(dim=2)
    assert changed.tolist() == [[False, True] * 4] * 3
    with torch.no_grad():
        model.token_embedding.weight[:CODES] += 1
    assert (model.logits(prefix, indices)[:, 0] == before[:, 0]).all()


@pytest.mark.parametrize("depth", [1, 2])
def test_the_loss_is_the_cross_entropy_also_in_parts(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model((3, 4), depth=depth)
    prefix, indices = some_input(model)
    logits = model.logits(prefix, indices)
    expected = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none")
    for most in (1 << 26, 100):
        monkeypatch.setattr("transformer.layers.MAX_LOGITS", most)
        loss = model.loss(prefix, indices)
        # the loss is taken in float32
        torch.testing.assert_close(loss.flatten().double(), expected, rtol=1e-5, atol=1e-5)
        gradient = torch.autograd.grad(loss.sum(), model.head.weight)[0]
        wanted = torch.autograd.grad(expected.sum(), model.head.weight, retain_graph=True)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_completion_of_residual_codes_with_conditions() -> None:
    model = make_model((4, 4), depth=2, prefix=5)
    prefix, given = some_input(model, 4)
    keep = region_mask("left:0.5", (4, 4))
    one = complete(model, prefix, given, keep)
    many = complete(model, prefix, given, keep, candidates=6, batch_size=5)
    for sampled in (one, many):
        assert sampled.shape == given.shape
        assert torch.equal(sampled[:, keep], given[:, keep])
    scores = [
        log_likelihood(model, prefix, sampled, later_known_mask(keep)).sum()
        for sampled in (one, many)
    ]
    assert scores[1] > scores[0]


# --- model folders -------------------------------------------------------------------------------


def test_a_model_folder_gives_the_model_back(tmp_path: Path) -> None:
    model = make_model((3, 4), depth=2, prefix=5, dtype=torch.float32, order_anneal=(0.5, 1))
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training
    torch.testing.assert_close(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "VQVAE"}, "it holds a VQVAE, but a GPT is needed"),
        ({"format_version": 2}, "format_version 2 is too new; update this code"),
        ({"dim": "32"}, "dim must be of type int, got '32'"),
        ({"num_layers": True}, "num_layers must be of type int, got True"),
        ({"latent_dim": [4]}, r"latent_dim must be of type .*, got \(4,\)"),
        ({"latent_dim": [4, 2.5]}, r"latent_dim must be of type .*, got \(4, 2\.5\)"),
        ({"colour": "red"}, "'colour'"),
        ({"dim": 31}, "multiple of"),
        ({"dim": 64}, r"model\.safetensors does not fit config\.json"),
        ({"codebook_size": 10**15}, r"model\.safetensors does not fit config\.json"),
    ],
    ids=str,
)
def test_a_model_folder_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict, message: str
) -> None:
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)
