"""Metrics and their intervals, against their definitions."""

import math

import pytest
import torch

from utils.evaluation.metrics import (
    POSITIVE,
    Estimate,
    baselines,
    code_estimates,
    codebook_metrics,
    entropy,
    estimate,
    image_metrics,
    index_counts,
    mean,
    psnr,
    resample,
    squared_error,
    ssim,
    token_divergence,
)
from utils.training.loop import Averages


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


def test_squared_error_is_on_the_scale_0_to_1() -> None:
    black, white, grey = (torch.full((1, 3, 4, 5), value) for value in (-1.0, 1.0, 0.0))
    images = torch.cat([black, black, white])
    others = torch.cat([white, grey, white])
    assert squared_error(images, others).tolist() == [1, 0.25, 0]
    low = squared_error(images.bfloat16(), others.bfloat16())
    assert low.dtype == torch.float32


def test_psnr() -> None:
    assert psnr(1.0) == 0
    assert psnr(0.001) == pytest.approx(30)
    assert math.isfinite(psnr(0.0))


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 24, 40)])
def test_ssim_and_psnr_agree_with_others(shape: tuple[int, ...]) -> None:
    """With torchmetrics and scikit-image, which share no code with each other."""
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator) * 2 - 1
    others = (images + 0.4 * torch.randn(shape, generator=generator)).clamp(-1, 1)
    x, y = (images + 1) / 2, (others + 1) / 2
    values = ssim(images, others)
    _, everywhere = structural_similarity_index_measure(
        x, y, data_range=1.0, return_full_image=True
    )  # also where the window reaches beyond the image, into a mirror
    inside = everywhere[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert values.tolist() == pytest.approx(inside.tolist(), abs=1e-5)
    expected = [
        structural_similarity(
            *(a.numpy(), b.numpy()),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=0,
        )
        for a, b in zip(x, y, strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    mse = float(squared_error(images, others).mean())
    assert psnr(mse) == pytest.approx(float(peak_signal_noise_ratio(x, y, data_range=1.0)))


def test_ssim_of_equal_and_of_small_images() -> None:
    images = torch.rand(2, 3, 8, 9) * 2 - 1
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    assert ssim(images, -images).max() < 0.5
    flat = torch.full((1, 1, 4, 4), -0.9)
    assert float(ssim(flat, flat + 0.1)) < 0.9  # another brightness, the same structure


def test_metrics_of_rgba_images_are_those_of_their_composites() -> None:
    """On black alone, a black drawing equals an empty image."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 6, 4, 16, 16, generator=generator)
    first[:, :3] *= first[:, 3:]  # premultiplied
    second[:, :3] *= second[:, 3:]
    found = image_metrics(first * 2 - 1, second * 2 - 1)
    expected = []
    for background in (0, 1):
        x, y = (image[:, :3] + background * (1 - image[:, 3:]) for image in (first, second))
        expected.append(image_metrics(x * 2 - 1, y * 2 - 1))
    for name, values in found.items():
        mean = (expected[0][name] + expected[1][name]) / 2
        assert torch.allclose(values, mean, atol=1e-6), name
    drawing, empty = torch.full((1, 4, 16, 16), -1.0), torch.full((1, 4, 16, 16), -1.0)
    drawing[:, 3] = 1
    assert image_metrics(drawing, empty)["mse"].item() == pytest.approx(0.5)


def test_entropy() -> None:
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0], [0.25, 0.75, 0, 0]])
    assert entropy(shares).tolist() == pytest.approx([2, 0, 0.8112781244591328])


def test_codebook_metrics() -> None:
    assert codebook_metrics(torch.tensor([5, 5, 0, 0])) == {
        "codebook_usage": pytest.approx(50),
        "perplexity": pytest.approx(2),
    }
    few = torch.zeros(1024)
    few[:10] = 1  # ten indices cannot use more than ten codes
    assert codebook_metrics(few)["codebook_usage"] == 100
    assert codebook_metrics(few * 2)["codebook_usage"] == 50
    large = codebook_metrics(torch.full((1024,), 3_000_001))
    assert large == {"codebook_usage": 100, "perplexity": pytest.approx(1024)}


def test_the_unigram_baseline() -> None:
    train, val = torch.zeros(6, 1, 1), torch.tensor([0, 0, 0, 1]).view(4, 1, 1)
    expected = -(3 * math.log2(7 / 9) + 1 * math.log2(1 / 9)) / 4  # one added to each of 3 counts
    assert baselines(train, val, 3, 1)[0] == pytest.approx(expected)
    even = torch.arange(64).repeat(100).view(-1, 4, 4)
    assert baselines(even, torch.randint(64, (9, 4, 4)), 64, 1)[0] == pytest.approx(6)
    depths = even[..., None].expand(-1, -1, -1, 2)  # which is known
    assert baselines(depths, depths[:9], 64, 2)[0] == pytest.approx(6)


def test_averages() -> None:
    averages = Averages()
    for loss, norm in ((1.0, 2.0), (2.0, 4.0), (6.0, 0.0)):
        averages.add({"loss": torch.tensor(loss), "norm": norm})
    values = averages.take()
    assert values.pop("steps_per_second") > 0
    assert values == {"loss": 3, "norm": 2}
    averages.add({"loss": 5.0})
    assert averages.take()["loss"] == 5


def test_bigrams_foretell_what_unigrams_cannot() -> None:
    """A cycle 0 1 2 3 0 1 ... has 2 bits a token as unigrams, and nearly none as bigrams."""
    grids = (torch.arange(16) + torch.arange(400)[:, None]).remainder(4).view(400, 4, 4)
    bits = baselines(grids[:300], grids[300:], 4, 1)[1]
    assert bits == pytest.approx(2 / 16, abs=0.01)  # only the first index is news


def test_bigram_probabilities_sum_to_one() -> None:
    """Every continuation of a pair, weighed by the price that it is given."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.randint(0, 5, (50, 1, 4), generator=generator)
    for first in range(7):  # 5 and 6 never occur in training
        lone = baselines(grids, torch.tensor([[[first]]]), 7, 1)[1]
        pairs = [torch.tensor([[[first, second]]]) for second in range(7)]
        prices = [2 * baselines(grids, pair, 7, 1)[1] - lone for pair in pairs]
        assert sum(2**-price for price in prices) == pytest.approx(1)


def test_counts_of_resamples() -> None:
    grids = torch.randint(0, 7, (40, 3, 4), generator=torch.Generator().manual_seed(0))
    weights = resample(40, 0)
    found = index_counts(grids, 9, 1, weights)
    counts = torch.bincount(grids.flatten(), minlength=9)
    assert torch.equal(found[0], counts.double())
    sampled = grids[torch.arange(40).repeat_interleave(weights[3].long())]
    assert torch.equal(found[3], torch.bincount(sampled.flatten(), minlength=9).double())
    found = code_estimates(found, tokens_per_pixel=12 / 192)
    assert found["codebook_usage"].value == pytest.approx(
        codebook_metrics(counts)["codebook_usage"]
    )
    assert found["perplexity"].value == pytest.approx(codebook_metrics(counts)["perplexity"])
    assert found["entropy_per_pixel"].value == pytest.approx(
        float(entropy(counts[None] / counts.sum())) * 12 / 192
    )


def test_each_depth_has_codes_of_its_own() -> None:
    grids = torch.tensor([[[[0, 1]]], [[[0, 2]]]])  # (2, 1, 1, depth 2)
    assert index_counts(grids, 3, 2, resample(2, 0))[0].tolist() == [2, 0, 0, 0, 1, 1]


def test_divergence_is_0_for_equal_and_1_for_disjoint_frequencies() -> None:
    a, b = (torch.tensor([part] * 3, dtype=torch.double) for part in ([0.5, 0.5, 0], [0, 0, 1]))
    assert token_divergence(a, a).value == pytest.approx(0)
    assert token_divergence(a, b).value == pytest.approx(1)
    half = torch.tensor([[0.5, 0, 0.5]] * 3, dtype=torch.double)
    middle = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert token_divergence(a, half).value == pytest.approx(middle - 1)
