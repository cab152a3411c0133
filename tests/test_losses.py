"""The training's terms: pixels, perception, adversary, and the autopilot of the last."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.distributed import Distributed, autocast
from utils.training import resume
from vqvae import VQVAE, VQVAEConfig
from vqvae.adversary import (
    Adversary,
    Autopilot,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from vqvae.discriminator import PatchDiscriminator
from vqvae.gradients import add_gradients
from vqvae.losses import ObjectiveConfig, ReconstructionLoss
from vqvae.perceptual import BACKBONES, PerceptualLoss

CPU = partial(autocast, torch.device("cpu"), "fp32")


def make_model() -> VQVAE:
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=(16, 16), in_channels=1, channels=32, codebook_size=16)
    return VQVAE(config)


def make_adversary(**settings: float) -> Adversary:
    settings = {"disc_weight": 0.8, "disc_layers": 2, "disc_channels": 8, **settings}
    return Adversary(ObjectiveConfig(**settings), 1, (16, 16), total_steps=100)


def test_pixel_terms_are_weighted_and_others_do_not_exist() -> None:
    images, made = torch.rand(2, 2, 1, 8, 8)
    losses = ReconstructionLoss(ObjectiveConfig(l1_weight=2.0, l2_weight=3.0))
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
    distance = PerceptualLoss("alex", trained=False)
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
    make, _ = BACKBONES[network]
    features = make().features
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
    remedy = r"https://.*alexnet.*--lpips_weights.*--perceptual_weight 0"
    with pytest.raises(OSError, match=remedy):
        PerceptualLoss("alex", str(tmp_path / "missing.pth"))
    for other in ({"features.0.weight": torch.zeros(3)}, [1, 2]):
        torch.save(other, tmp_path / "other.pth")
        wrong = rf"other\.pth does not hold the weights of alex; download {remedy}"
        with pytest.raises(OSError, match=wrong):
            PerceptualLoss("alex", str(tmp_path / "other.pth"))
    with pytest.raises(OSError, match=r"or leave it out$"):
        PerceptualLoss("alex", str(tmp_path / "other.pth"), otherwise="leave it out")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_internet)
    with pytest.raises(OSError, match=remedy):
        PerceptualLoss("alex")


def no_internet(*arguments: object, **options: object) -> None:
    raise OSError("Name or service not known")


def test_adversarial_losses_of_known_logits() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert float(discriminator_loss("hinge", real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))
    vanilla = F.binary_cross_entropy_with_logits(real, torch.ones(2))
    vanilla += F.binary_cross_entropy_with_logits(fake, torch.zeros(2))
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), vanilla / 2)
    assert float(generator_loss("hinge", fake)) == pytest.approx(1.25)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones(2))
    torch.testing.assert_close(generator_loss("non_saturating", fake), expected)


def test_the_adaptive_weight_is_the_ratio_of_gradients_and_a_constant() -> None:
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(last.square().sum(), (2 * last).sum(), last, cap=1e4)
    assert float(weight) == pytest.approx(10 / (8**0.5 + 1e-4))
    assert not weight.requires_grad
    assert float(adaptive_weight(last.square().sum(), (2 * last).sum(), last, cap=0.5)) == 0.5


def test_each_side_gets_only_its_own_gradients() -> None:
    model, adversary = make_model(), make_adversary()
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    made = model(images).reconstruction
    last = model.decoder.conv_out.weight
    adversary.autopilot.strength = 0.5
    term, _ = adversary.generator_term(made, F.mse_loss(made, images), last)
    term.backward()
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert last.grad.abs().sum() > 0
    model.zero_grad()
    adversary.discriminator_term(images, model(images).reconstruction)[0].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in adversary.parameters())


def test_losses_are_in_float32_under_autocast() -> None:
    adversary, images = make_adversary(lecam_weight=0.1), torch.rand(4, 1, 16, 16)
    with autocast(torch.device("cpu"), "bf16"):
        loss, values = adversary.discriminator_term(images, images)
        assert adversary.discriminator(images).dtype == torch.bfloat16
    assert {loss.dtype, *(value.dtype for value in values.values())} == {torch.float32}


def test_r1_is_the_squared_gradient_at_real_images() -> None:
    plain, penalised = make_adversary(), make_adversary(r1_weight=4.0)
    for adversary in (plain, penalised):
        adversary.eval()  # BatchNorm would couple the images
    images, made = torch.rand(2, 3, 1, 16, 16)
    slopes = torch.autograd.functional.jacobian(
        lambda x: plain.discriminator(x).sum(dim=(1, 2, 3)), images
    )
    norms = torch.stack([slopes[i, i].square().sum() for i in range(3)])
    difference, logged = penalised.discriminator_term(images, made)
    difference = difference - plain.discriminator_term(images, made)[0]
    torch.testing.assert_close(difference, 2 * norms.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logged["r1_loss"], 2 * norms.mean(), rtol=1e-4, atol=1e-6)


def test_lecam_is_the_distance_from_the_moving_averages_of_the_logits() -> None:
    plain, held = make_adversary(), make_adversary(lecam_weight=3.0)
    for adversary in (plain, held):
        adversary.eval()  # BatchNorm would change between the calls
    averages = torch.zeros(2)
    for step in range(3):
        torch.manual_seed(step)
        images, made = torch.rand(2, 3, 1, 16, 16) * 5
        real, fake = plain.discriminator(images), plain.discriminator(made)
        averages = 0.999 * averages + 0.001 * torch.stack([real.mean(), fake.mean()]).detach()
        distance = (real - averages[1]).clamp(min=0).square().mean()
        distance = distance + (averages[0] - fake).clamp(min=0).square().mean()
        difference, logged = held.discriminator_term(images, made)
        torch.testing.assert_close(logged["lecam_loss"], 3 * distance, rtol=1e-4, atol=1e-6)
        difference = difference - plain.discriminator_term(images, made)[0]
        torch.testing.assert_close(difference, 3 * distance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(held.logits, averages, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("cap", "expected"), [(0.5, 0.5), (0.0, 1.0)])
def test_the_adaptive_weight_is_capped_and_logged(cap: float, expected: float) -> None:
    model, adversary = make_model(), make_adversary(disc_adaptive_max=cap)
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    made = model(images).reconstruction
    last = model.decoder.conv_out.weight
    loss = 1e6 * F.mse_loss(made, images)  # its gradient is far above the adversary's
    adversary.autopilot.strength = 0.5
    term, logged = adversary.generator_term(made, loss, last)
    assert float(logged["adaptive_weight"]) == pytest.approx(expected)
    adversarial = generator_loss("hinge", adversary.discriminator(made))
    wanted = 0.4 * expected * adversarial.item()
    assert term.item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("with_adversary", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(with_adversary: bool) -> None:
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    gradients = []
    for parts in (1, 4):
        model = make_model().eval()  # in training the codes would move between the parts
        acting = {}
        if with_adversary:
            adversary = make_adversary(disc_adaptive_max=0.0).eval()
            last = model.decoder.conv_out.weight
            acting = {"adversary": adversary, "last": last, "step": 70}  # in the ramp
        losses = ReconstructionLoss(ObjectiveConfig())
        values, indices = add_gradients(model, images, losses, CPU, accumulate=parts, **acting)
        trained = [*model.parameters(), *(adversary.parameters() if with_adversary else ())]
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        assert len(indices) == 8
        assert values["mse"] * 4 == pytest.approx(float(values["l2_loss"]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_the_tokenizer_stands_still_while_the_discriminator_learns_alone() -> None:
    model, adversary = make_model(), make_adversary()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    losses = ReconstructionLoss(ObjectiveConfig())
    acting = {"adversary": adversary, "last": model.decoder.conv_out.weight}
    add_gradients(model, images, losses, CPU, accumulate=2, **acting, step=50)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert any(parameter.grad.abs().sum() > 0 for parameter in adversary.parameters())


def test_before_its_start_the_discriminator_learns_nothing() -> None:
    model, adversary = make_model(), make_adversary()
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    losses = ReconstructionLoss(ObjectiveConfig())
    acting = {"adversary": adversary, "last": model.decoder.conv_out.weight}
    values, _ = add_gradients(model, images, losses, CPU, **acting, step=49)
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert model.decoder.conv_out.weight.grad.abs().sum() > 0
    assert not any("disc" in name for name in values)


def test_the_autopilot_waits_ramps_up_and_gives_way() -> None:
    config = ObjectiveConfig(
        disc_weight=1.0, disc_start=0.5, disc_warmup=0.1, disc_ramp=0.1, disc_bound=0.1
    )
    autopilot = Autopilot.plan(config, 1000)
    assert [autopilot.phase(step) for step in (0, 499, 500, 599, 600)] == [
        *("before", "before", "alone", "alone", "both")
    ]
    assert not autopilot.observe(0.02)
    assert not autopilot.observe(0.01)
    growth = [autopilot.advance() for _ in range(50)]
    assert growth[0] == pytest.approx(0.01)
    assert growth[-1] == pytest.approx(0.5)
    assert not autopilot.observe(0.0109)
    assert autopilot.observe(0.0111)
    assert autopilot.strength == pytest.approx(0.25)
    assert autopilot.advance() == pytest.approx(0.255)
    for _ in range(1000):
        autopilot.advance()
    assert autopilot.strength == 1.0


def test_without_autopilot_all_is_there_at_once() -> None:
    # The share that the discriminator would learn alone has no say any more.
    config = ObjectiveConfig(disc_weight=1.0, disc_start=0.5, disc_warmup=0.9, disc_autopilot=False)
    autopilot = Autopilot.plan(config, 1000)
    assert autopilot.phase(500) == "both"
    assert autopilot.advance() == 1.0
    assert not autopilot.observe(100.0)


def test_an_adversary_and_its_optimiser_survive_a_checkpoint(tmp_path: Path) -> None:
    from utils.files import write_folder

    def step(adversary: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        images, made = torch.rand(2, 4, 1, 16, 16)
        adversary.discriminator_term(images, made)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    # Fused, channels_last: moments restored row-major went to other weights than their own.
    first, second = (
        make_adversary(lecam_weight=0.1).to(memory_format=torch.channels_last) for _ in range(2)
    )
    optimizers = [torch.optim.AdamW(a.parameters(), 1e-2, fused=True) for a in (first, second)]
    step(first, optimizers[0], 1)
    first.autopilot.strength, first.autopilot.baseline = 0.3, 0.0123456789
    alone = Distributed(0, 1, torch.device("cpu"))
    states = [
        resume.State(alone, a, {}, progress=resume.Progress(), optimizer=optimizer)
        for a, optimizer in zip((first, second), optimizers, strict=True)
    ]
    weights = {"model.safetensors": first.state_dict()}
    write_folder(tmp_path / "last", states[0].files() | weights)
    states[1].restore(tmp_path / "last")
    for adversary, optimizer in zip((first, second), optimizers, strict=True):
        step(adversary, optimizer, 2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert second.autopilot == first.autopilot


def test_a_discriminator_says_what_is_too_small_for_it() -> None:
    assert PatchDiscriminator(3, (28, 28))(torch.rand(2, 3, 28, 28)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="24 pixels"):
        PatchDiscriminator(3, (16, 64))


@pytest.mark.parametrize(
    "settings",
    [
        {"l2_weight": 0.0},
        {"l2_weight": float("nan")},
        {"perceptual_weight": float("inf")},
        {"disc_start": 1.0, "disc_autopilot": False},
        {"disc_weight": -1.0},
        {"disc_start": 0.97, "disc_warmup": 0.05},
        {"disc_layers": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        ObjectiveConfig(**settings)
