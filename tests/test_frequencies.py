"""How often indices occur, and the picture of it."""

import math

import numpy as np
import pytest
import torch

from utils.evaluation.metrics import (
    code_estimates,
    codebook_metrics,
    entropy,
    index_frequencies,
    resample,
    token_divergence,
)
from utils.figures import distributions


def test_frequencies_are_counts_over_their_sum() -> None:
    grids = torch.randint(0, 7, (40, 3, 4), generator=torch.Generator().manual_seed(0))
    weights = resample(40, 0)
    shares = index_frequencies(grids, 9, 1, weights)
    counts = torch.bincount(grids.flatten(), minlength=9)
    assert torch.allclose(shares[0], counts / counts.sum().double())
    drawn = grids[torch.arange(40).repeat_interleave(weights[3].long())]
    assert torch.allclose(shares[3], torch.bincount(drawn.flatten(), minlength=9).double() / 480)
    found = code_estimates(shares, tokens_per_pixel=12 / 192)
    assert found["codebook_usage"].value == pytest.approx(
        codebook_metrics(counts)["codebook_usage"]
    )
    assert found["perplexity"].value == pytest.approx(codebook_metrics(counts)["perplexity"])
    assert found["entropy_per_pixel"].value == pytest.approx(
        float(entropy(counts[None] / counts.sum())) * 12 / 192
    )


def test_each_depth_has_codes_of_its_own() -> None:
    grids = torch.tensor([[[[0, 1]]], [[[0, 2]]]])  # (2, 1, 1, depth 2)
    assert index_frequencies(grids, 3, 2, resample(2, 0))[0].tolist() == [0.5, 0, 0, 0, 0.25, 0.25]


def test_divergence_is_0_for_equal_and_1_for_disjoint_frequencies() -> None:
    a, b = (torch.tensor([part] * 3, dtype=torch.double) for part in ([0.5, 0.5, 0], [0, 0, 1]))
    assert token_divergence(a, a).value == pytest.approx(0)
    assert token_divergence(a, b).value == pytest.approx(1)
    half = torch.tensor([[0.5, 0, 0.5]] * 3, dtype=torch.double)
    middle = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert token_divergence(a, half).value == pytest.approx(middle - 1)


def test_distributions_stand_up_and_hang_down_in_the_order_of_the_first() -> None:
    shares, others = torch.tensor([0.0, 1.0, 0.5, 0.25]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    picture = np.asarray(distributions(shares, others))
    columns = picture[:, picture.shape[1] // 8 :: picture.shape[1] // 4]
    lit = (columns > 128).sum(axis=0) / (picture.shape[0] / 2)
    assert lit == pytest.approx([1, 0.5 + 1, 0.25, 0], abs=0.06)
    assert columns[0].tolist() == [255, 0, 0, 0]
    assert columns[-1].tolist() == [0, 255, 0, 0]
