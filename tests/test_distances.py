"""Distances of sets of features and nearest neighbours, against other implementations."""

import numpy as np
import pytest
import torch

from utils.evaluation import distances
from utils.evaluation.distances import (
    class_score,
    closest,
    copies,
    kernel_distance,
    manifold_metrics,
    nearest,
)
from utils.evaluation.metrics import frechet_distance, resample


def features(count: int, shift: float, seed: int, width: int = 12) -> torch.Tensor:
    """Correlated and shifted features, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=generator) @ mixing * (1 + shift) + shift


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return features(300, 0.0, 1), features(200, 0.3, 2)


def weights(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(resample(len(part), seed) for seed, part in enumerate(parts))


def test_frechet_distance_agrees_with_torchmetrics_and_scipy(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    found = frechet_distance(*pair, weights(*pair)).value
    moments = [(part.double().mean(0), part.double().T.cov()) for part in pair]
    assert found == pytest.approx(float(_compute_fid(*moments[0], *moments[1])), rel=1e-6)
    (mean_1, cov_1), (mean_2, cov_2) = (
        (part.numpy().mean(0, dtype=float), np.cov(part.numpy().astype(float), rowvar=False))
        for part in pair
    )
    cross = np.trace(sqrtm(cov_1 @ cov_2)).real
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    assert found == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    """The covariances have no full rank, where a matrix root from elsewhere gives up."""
    from torchmetrics.image.fid import _compute_fid

    pair = features(9, 0.0, 1, width=40), features(7, 0.3, 2, width=40)
    moments = [(part.double().mean(0), part.double().T.cov()) for part in pair]
    expected = float(_compute_fid(*moments[0], *moments[1]))
    assert frechet_distance(*pair, weights(*pair)).value == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    pair = features(250, 0.0, 1), features(250, 0.3, 2)
    expected = poly_mmd(*(part.double() for part in pair))
    assert kernel_distance(*pair, weights(*pair)).value == pytest.approx(float(expected), rel=1e-6)


def test_kernel_distance_of_sets_of_one_kind_is_0_on_average() -> None:
    values = []
    for trial in range(20):
        pair = features(100, 0.0, 2 * trial), features(80, 0.0, 2 * trial + 1)
        values.append(kernel_distance(*pair, weights(*pair)).value)
    spread = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * spread


def test_resamples_of_a_kernel_distance_are_as_written_out() -> None:
    """A resample's estimate from its very images, without pairs of copies of one image."""
    first, second = features(20, 0.0, 1), features(15, 0.2, 2)
    pair = weights(first, second)
    found = kernel_distance(first, second, tuple(w[[0, 0, 1]] for w in pair))
    rows, others = (w[1].long() for w in pair)
    rows = torch.arange(20).repeat_interleave(rows)
    others = torch.arange(15).repeat_interleave(others)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    estimate = -2 * kernel(first[rows], second[others]).mean()
    for x, resampled in ((first, rows), (second, others)):
        different = resampled[:, None] != resampled
        estimate += kernel(x[resampled], x[resampled])[different].mean()
    deviation = abs(float(estimate) - found.value) / 2**0.5  # of the two estimates
    assert found.standard_error == pytest.approx(deviation, rel=1e-6)


def test_class_score_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    class Given(torch.nn.Module):
        """Images of 1 x classes pixels are their own logits."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1) / 40

    pixels = torch.randint(0, 256, (300, 1, 1, 10), dtype=torch.uint8)
    reference = InceptionScore(feature=Given(), splits=1)
    reference.update(pixels)
    found = class_score(pixels.flatten(1) / 40, resample(300, 0))
    assert found.value == pytest.approx(float(reference.compute()[0]), rel=1e-4)
    certain = torch.eye(10).repeat(30, 1) * 1000
    assert class_score(certain, resample(300, 0)).value == pytest.approx(10)
    assert class_score(torch.zeros(300, 10), resample(300, 0)).value == pytest.approx(1)


def test_identical_sets_are_at_0() -> None:
    part = features(300, 0.0, 1)
    pair = weights(part, part)
    assert frechet_distance(part, part, pair).value == pytest.approx(0, abs=1e-6)
    same = frechet_distance(part, part, (pair[0], pair[0]))
    assert same.standard_error == pytest.approx(0, abs=1e-6)


def test_intervals_of_distances_contain_a_second_sample() -> None:
    """Of sets that differ, and of sets of one kind, whose distance is all noise."""
    for shift in (0.0, 0.3):
        held = 0
        for trial in range(12):
            sets = [features(400, s, 3 * trial + n) for n, s in enumerate((0.0, shift, shift))]
            low, high = frechet_distance(sets[0], sets[1], weights(*sets[:2])).interval
            again = frechet_distance(sets[0], sets[2], weights(sets[0], sets[2])).value
            held += low <= again <= high
        assert held >= 9


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few images are cut into several blocks, the last not full."""
    monkeypatch.setattr(distances, "QUERIES", 64)
    monkeypatch.setattr(distances, "BLOCK", 48 * 300)


def normals(count: int, seed: int, scale: float = 1.0, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * scale + 40


@pytest.mark.parametrize("k", [1, 3, 50])
def test_nearest_is_as_by_brute_force(k: int) -> None:
    queries, references = normals(150, 0), normals(200, 1)
    expected = torch.cdist(queries.double(), references.double()).topk(k, largest=False)
    distances, rows = nearest(queries, references, k)
    assert torch.equal(rows, expected.indices)
    assert torch.allclose(distances.double(), expected.values, atol=1e-5)


def test_a_copy_is_at_0_whatever_its_size() -> None:
    references = torch.randint(0, 256, (300, 784), dtype=torch.uint8)
    distances, rows = nearest(references[[7, 290]], references)
    assert distances.flatten().tolist() == [0, 0]
    assert rows.flatten().tolist() == [7, 290]


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, samples = normals(190, 0), normals(170, 1, scale=1.3)
    expected = calculate_precision_recall_full(samples.double(), real.double())
    found = manifold_metrics(real, samples, (resample(190, 0), resample(170, 1)))
    assert (found["precision"].value, found["recall"].value) == pytest.approx(expected, abs=1e-4)
    assert 0 < found["precision"].standard_error < 0.1


def test_density_and_coverage_are_as_by_brute_force() -> None:
    real, samples = normals(190, 0), normals(170, 1, scale=1.3)
    radii = torch.cdist(real.double(), real.double()).kthvalue(6).values  # the image itself first
    inside = torch.cdist(samples.double(), real.double()) <= radii
    found = manifold_metrics(real, samples, (resample(190, 0), resample(170, 1)))
    assert found["density"].value == pytest.approx(float(inside.double().sum() / 5 / 170))
    assert found["coverage"].value == pytest.approx(float(inside.any(dim=0).double().mean()))


def test_identical_sets_and_sets_far_apart() -> None:
    real = normals(100, 0)
    pair = resample(100, 0), resample(100, 1)
    same = manifold_metrics(real, real, pair)
    assert [same[key].value for key in ("precision", "recall", "coverage")] == [1, 1, 1]
    apart = manifold_metrics(real, real + 1000, pair)
    assert all(figure.value == 0 for figure in apart.values())


def test_copies_are_found_and_new_images_are_none() -> None:
    training = normals(400, 0, width=40)
    copied = training[5:15] + 0.01
    new = closest(normals(200, 2, width=40), training)
    found = closest(torch.cat([normals(90, 1, width=40), copied]), training)
    assert int(copies(new, new).sum()) == 2  # of 200, by definition
    assert found.rows[90:].tolist() == list(range(5, 15))
    assert set(found.ratios.argsort()[:10].tolist()) == set(range(90, 100))
    assert 0.1 <= copies(found, new).double().mean() <= 0.13


def test_images_that_lie_close_together_are_no_copies() -> None:
    """Half of the images in a dense place, where all distances are small."""
    training = torch.cat([normals(300, 0, width=40), normals(300, 1, 0.01, width=40)])
    new = closest(
        torch.cat([normals(100, 2, width=40), normals(100, 3, 0.01, width=40)]),
        training,
    )
    dense = closest(normals(200, 4, 0.01, width=40), training)
    assert copies(dense, new).double().mean() < 0.05
