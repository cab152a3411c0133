"""Nearest neighbours and what is counted by them, against brute force."""

import pytest
import torch

from utils.evaluation import distances
from utils.evaluation.distances import (
    closest,
    copy_metrics,
    copy_threshold,
    manifold_metrics,
    nearest,
)
from utils.evaluation.metrics import resample


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few images are cut into several blocks, the last not full."""
    monkeypatch.setattr(distances, "QUERIES", 64)
    monkeypatch.setattr(distances, "REFERENCES", 48)


def draw(count: int, seed: int, scale: float = 1.0, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * scale + 40


@pytest.mark.parametrize("k", [1, 3, 50])
def test_nearest_is_as_by_brute_force(k: int) -> None:
    queries, references = draw(150, 0), draw(200, 1)
    expected = torch.cdist(queries.double(), references.double()).topk(k, largest=False)
    found = nearest(queries, references, k)
    assert torch.equal(found.rows, expected.indices)
    assert torch.allclose(found.distances.double(), expected.values, atol=1e-5)


def test_a_copy_is_at_0_whatever_its_size() -> None:
    references = torch.randint(0, 256, (300, 784), dtype=torch.uint8)
    found = nearest(references[[7, 290]], references)
    assert found.distances.flatten().tolist() == [0, 0]
    assert found.rows.flatten().tolist() == [7, 290]


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, samples = draw(190, 0), draw(170, 1, scale=1.3)
    expected = calculate_precision_recall_full(samples.double(), real.double())
    found = manifold_metrics(real, samples, (resample(190, 0), resample(170, 1)))
    assert (found["precision"].value, found["recall"].value) == pytest.approx(expected, abs=1e-4)
    assert 0 < found["precision"].standard_error < 0.1


def test_density_and_coverage_are_as_by_brute_force() -> None:
    real, samples = draw(190, 0), draw(170, 1, scale=1.3)
    radii = torch.cdist(real.double(), real.double()).kthvalue(6).values  # the image itself first
    inside = torch.cdist(samples.double(), real.double()) <= radii
    found = manifold_metrics(real, samples, (resample(190, 0), resample(170, 1)))
    assert found["density"].value == pytest.approx(float(inside.double().sum() / 5 / 170))
    assert found["coverage"].value == pytest.approx(float(inside.any(dim=0).double().mean()))


def test_identical_sets_and_sets_far_apart() -> None:
    real = draw(100, 0)
    pair = resample(100, 0), resample(100, 1)
    same = manifold_metrics(real, real, pair)
    assert [same[key].value for key in ("precision", "recall", "coverage")] == [1, 1, 1]
    apart = manifold_metrics(real, real + 1000, pair)
    assert all(figure.value == 0 for figure in apart.values())


def test_copies_are_found_and_new_images_are_none() -> None:
    training = draw(400, 0, width=40)
    copies = training[5:15] + 0.01
    new = closest(draw(200, 2, width=40), training)
    found = closest(torch.cat([draw(90, 1, width=40), copies]), training)
    limit = copy_threshold(new)
    assert int((new.ratios <= limit).sum()) == 2  # of 200, by definition
    assert found.rows[90:].tolist() == list(range(5, 15))
    assert set(found.ratios.argsort()[:10].tolist()) == set(range(90, 100))
    values = copy_metrics(found, "pixels", limit, resample(100, 0))
    assert 0.1 <= values["copies_pixels"].value <= 0.13
    assert values["nearest_pixels"].value == pytest.approx(float(found.distances.mean()))


def test_images_that_lie_close_together_are_no_copies() -> None:
    """Half of the images in a dense place, where all distances are small."""
    training = torch.cat([draw(300, 0, width=40), draw(300, 1, 0.01, width=40)])
    new = closest(torch.cat([draw(100, 2, width=40), draw(100, 3, 0.01, width=40)]), training)
    dense = closest(draw(200, 4, 0.01, width=40), training)
    share = copy_metrics(dense, "pixels", copy_threshold(new), resample(200, 0))["copies_pixels"]
    assert share.value < 0.05
