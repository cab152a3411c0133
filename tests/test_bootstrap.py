"""Resamples and the errors that they give."""

import pytest
import torch

from utils.evaluation.metrics import POSITIVE, Estimate, estimate, mean, resample


def test_the_first_row_is_the_images_themselves() -> None:
    weights = resample(30, seed=0, replicates=7)
    assert weights.shape == (8, 30)
    assert weights[0].tolist() == [1] * 30
    assert weights.sum(dim=1).tolist() == [30] * 8
    assert torch.equal(weights, resample(30, seed=0, replicates=7))
    assert not torch.equal(weights, resample(30, seed=1, replicates=7))


def test_the_error_of_a_mean_is_the_textbook_one() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3 + 5
    found = mean(values, resample(2000, seed=0, replicates=400))
    assert found.value == pytest.approx(float(values.mean()), abs=1e-5)
    assert found.standard_error == pytest.approx(float(values.std()) / 2000**0.5, rel=0.12)


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for trial in range(300):
        values = torch.rand(100, generator=generator)
        low, high = mean(values, resample(100, seed=trial)).interval
        held += low <= 0.5 <= high
    assert 0.90 <= held / 300 <= 0.99


def test_the_value_is_not_moved_by_the_bias_of_the_resamples() -> None:
    """Resamples of all-different things have fewer kinds: their mean is no estimate."""
    estimates = torch.tensor([100.0, 63.0, 64.0, 62.0])
    assert estimate(estimates) == Estimate(100.0, 1.0)
    assert estimate(estimates).interval == pytest.approx((98.04, 101.96))


def test_intervals_end_where_the_metric_does() -> None:
    """Shares were said to reach above 1, and distances below 0."""
    right = torch.arange(50) > 0
    share = mean(right, resample(50, seed=0))
    assert share.interval[0] < share.value < share.interval[1] == 1
    assert mean(~right, resample(50, seed=0)).interval[0] == 0
    assert estimate(torch.tensor([0.1, 0.5, -0.5]), POSITIVE).interval[0] == 0
    assert estimate(torch.tensor([0.1, 0.5, -0.5])).interval[0] < 0
