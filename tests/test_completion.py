"""Given cells stay; candidates are ranked by the given cells that come after them."""

import pytest
import torch
from torch import Tensor

from tests.test_drawing import make_model, some_indices
from transformer import GPT, Guidance, PositionExtension, SamplingParams, complete, generate
from transformer.completion import later_known_mask
from utils.data.given import keep_side


def test_sides() -> None:
    assert keep_side("top:0.5", (4, 3)).tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    assert keep_side("right:0.34", (2, 3)).tolist() == [[False, False, True]] * 2
    assert keep_side("left:0.5", (2, 2)).tolist() == [[True, False]] * 2
    assert keep_side("bottom:0.25", (4, 1)).flatten().tolist() == [False, False, False, True]
    for text in ("top", "top:2", "middle:0.5", "left:1", "left:x", "left:nan"):
        with pytest.raises(ValueError, match=r"expected|nothing to draw"):
            keep_side(text, (4, 4))


def test_unforeseen_are_the_given_cells_behind_a_drawn_one() -> None:
    assert not later_known_mask(keep_side("top:0.5", (4, 4))).any()
    assert later_known_mask(keep_side("left:0.5", (2, 2))).tolist() == [
        [False, False],
        [True, False],
    ]


def log_likelihood(
    model: GPT,
    prefix: Tensor,
    indices: Tensor,
    cells: Tensor,
    position_extension: PositionExtension | None = None,
) -> Tensor:
    """Sum over `cells` (h, w) of log p(cell | cells before it), (N,), by one whole pass."""
    with torch.no_grad():
        nats = model(prefix, indices, position_extension=position_extension, loss=True)
    return -(nats * cells.flatten().repeat_interleave(model.config.depth)).sum(dim=1)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("side", ["left:0.5", "bottom:0.25", "right:0.34"])
@pytest.mark.parametrize("depth", [1, 2])
def test_scores_are_the_models_own_of_the_given_cells_behind(depth, side, guidance) -> None:
    """Without guidance and params, which are no part of how likely the model finds a cell."""
    model = make_model(depth=depth)
    prefix, given = torch.arange(5) % 4, torch.randint(11, (5, 4, 6, 2)[: 3 + (depth > 1)])
    keep, scores = keep_side(side, (4, 6)), torch.zeros(5)
    options = {
        "guidance": Guidance(guidance),
        "params": SamplingParams(0.5, top_k=3),
        "batch_size": 2,
    }
    drawn = generate(model, prefix, given=given, keep=keep, scores=scores, **options)
    expected = log_likelihood(model, prefix, drawn, later_known_mask(keep))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_scores_of_larger_grids_are_by_the_positions_that_they_are_drawn_with() -> None:
    """They were ranked by other positions, which learned ones do not even have."""
    model = make_model(window=3)
    prefix, given = some_indices((6, 9))
    keep, scores = keep_side("left:0.34", (6, 9)), torch.zeros(3)
    options = {
        "given": given,
        "keep": keep,
        "size": (6, 9),
        "position_extension": PositionExtension.INTERPOLATE,
    }
    drawn = generate(model, prefix, scores=scores, **options)
    expected = log_likelihood(
        model, prefix, drawn, later_known_mask(keep), PositionExtension.INTERPOLATE
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    learned = make_model(positions="learned", window=3)
    assert complete(learned, prefix, given, keep, candidates=2).shape == (3, 6, 9)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2}, {"positions": "learned"}, {"order_anneal": (0.5, 0.75)}],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_given_rows_at_the_top_come_in_at_once(rows, window, options) -> None:
    """With the logits of the whole pass, and all that later steps need in the cache."""
    if window and "order_anneal" in options:
        return
    model = make_model((7, 5), window, **options)
    prefix, indices = some_indices((7, 5))
    cache = model.make_cache(3)
    with torch.inference_mode():
        expected = model(prefix, indices)[:, rows * 5 :]
        logits = [model.prefill(prefix, indices[:, :rows], cache)]
        for cell in range(rows * 5, 34):
            logits.append(model.step(indices.flatten(1)[:, cell], 1 + cell, cache))
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["top:0.5", "left:0.5", "right:0.5"])
def test_completions_keep_what_is_given_and_candidates_fit_it_better(side: str) -> None:
    model = make_model()
    prefix, given = some_indices((4, 6), 8)
    keep = keep_side(side, (4, 6))
    one = complete(model, prefix, given, keep)
    many = complete(model, prefix, given, keep, candidates=8, batch_size=5)
    for drawn in (one, many):
        assert torch.equal(drawn[:, keep], given[:, keep])
    if side == "top:0.5":  # nothing to rank by
        assert torch.equal(one, many)
        return
    later = later_known_mask(keep)
    scores = [log_likelihood(model, prefix, drawn, later).sum() for drawn in (one, many)]
    assert scores[1] > scores[0]


def test_what_follows_a_kept_cell_is_drawn_given_it() -> None:
    model = make_model()
    prefix, given = some_indices((4, 6), 2)
    keep = keep_side("top:0.25", (4, 6))
    one, two = complete(model, prefix, given, keep), generate(model, prefix)
    assert not torch.equal(one[:, 1:], two[:, 1:])
