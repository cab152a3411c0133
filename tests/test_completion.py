"""Given cells stay; candidates are ranked by the given cells that come after them."""

import pytest
import torch

from tests.test_drawing import make_model, some_indices
from transformer import complete, generate
from transformer.completion import keep_side, log_likelihood, unforeseen


def test_sides() -> None:
    assert keep_side("top:0.5", (4, 3)).tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    assert keep_side("right:0.34", (2, 3)).tolist() == [[False, False, True]] * 2
    assert keep_side("left:0.5", (2, 2)).tolist() == [[True, False]] * 2
    assert keep_side("bottom:0.25", (4, 1)).flatten().tolist() == [False, False, False, True]
    for text in ("top", "top:2", "middle:0.5", "left:1", "left:x", "left:nan"):
        with pytest.raises(ValueError, match=r"expected|nothing to draw"):
            keep_side(text, (4, 4))


def test_unforeseen_are_the_given_cells_behind_a_drawn_one() -> None:
    assert not unforeseen(keep_side("top:0.5", (4, 4))).any()
    assert unforeseen(keep_side("left:0.5", (2, 2))).tolist() == [[False, False], [True, False]]


def test_likelihood_is_that_of_the_whole_pass() -> None:
    model = make_model()
    prefix, indices = some_indices((4, 6), 5)
    cells = torch.ones(4, 6, dtype=torch.bool)
    with torch.inference_mode():
        logs = model(prefix, indices).log_softmax(dim=-1)
    expected = logs.gather(2, indices.flatten(1)[:, :, None]).sum(dim=(1, 2))
    actual = log_likelihood(model, prefix, indices, cells, batch_size=2)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


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
    later = unforeseen(keep)
    scores = [log_likelihood(model, prefix, drawn, later, 8).sum() for drawn in (one, many)]
    assert scores[1] > scores[0]


def test_what_follows_a_kept_cell_is_drawn_given_it() -> None:
    model = make_model()
    prefix, given = some_indices((4, 6), 2)
    keep = keep_side("top:0.25", (4, 6))
    one, two = complete(model, prefix, given, keep), generate(model, prefix)
    assert not torch.equal(one[:, 1:], two[:, 1:])
