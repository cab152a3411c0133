"""Reconstruction terms: pixels and LPIPS, against the formulas and an independent network."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from vqvae.losses import BACKBONES, LossConfig, PerceptualLoss, ReconstructionLoss


def test_pixel_terms_are_weighted_and_others_do_not_exist() -> None:
    images, made = torch.rand(2, 2, 1, 8, 8)
    losses = ReconstructionLoss(LossConfig(l1_weight=2.0, l2_weight=3.0))
    terms = losses(made, images)
    assert terms.keys() == {"l1", "l2"}
    torch.testing.assert_close(terms["l1"], 2 * (made - images).abs().mean())
    torch.testing.assert_close(terms["l2"], 3 * (made - images).square().mean())
    assert losses.perceptual is None
    assert not list(losses.parameters())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_perceptual_distance_is_none_between_equals(channels: int) -> None:
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    distance = PerceptualLoss("alex", pretrained=False)
    images = torch.rand(2, channels, 64, 64) * 2 - 1
    assert torch.equal(distance(images, images), torch.zeros(2))
    assert (distance(images, -images) > 0).all()
    assert not any(module.training for module in distance.train().modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_perceptual_weights_are_read_from_a_file(network: str, tmp_path: Path) -> None:
    """The distance is LPIPS' formula on the file's network (equation 1), with its own heads."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    features = models.get_model(BACKBONES[network]).features
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "w.pth")
    distance = PerceptualLoss(network, str(tmp_path / "w.pth"))
    images, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1

    heads = [head.model[-1].weight for head in distance.lpips.lins]
    expected = torch.zeros(2)
    scaled = [lpips.ScalingLayer()(x) for x in (images, others)]
    ends = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}[network]  # the last ReLUs
    for number, layer in enumerate(features[: ends[-1] + 1]):
        scaled = [layer(x.clone()) for x in scaled]
        if number in ends:
            left, right = (F.normalize(x, dim=1, eps=1e-10) for x in scaled)
            weighted = (left - right).square() * heads[ends.index(number)]
            expected += weighted.sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(distance(images, others), expected, rtol=1e-4, atol=1e-6)


def test_missing_perceptual_weights_are_asked_for_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips")
    remedy = r"https://.*alexnet.*lpips_weights, or do without LPIPS$"
    with pytest.raises(OSError, match=remedy):
        PerceptualLoss("alex", str(tmp_path / "missing.pth"))
    for other in ({"features.0.weight": torch.zeros(3)}, [1, 2]):
        torch.save(other, tmp_path / "other.pth")
        wrong = rf"weights of alex, which .*other\.pth does not hold .*; download {remedy}"
        with pytest.raises(OSError, match=wrong):
            PerceptualLoss("alex", str(tmp_path / "other.pth"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_internet)
    with pytest.raises(OSError, match=remedy):
        PerceptualLoss("alex")


def no_internet(*arguments: object, **options: object) -> None:
    raise OSError("Name or service not known")


@pytest.mark.parametrize(
    "settings",
    [{"l2_weight": 0.0}, {"l2_weight": float("nan")}, {"perceptual_weight": float("inf")}],
)
def test_weights_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        LossConfig(**settings)
