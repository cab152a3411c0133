"""Discriminator, its losses and schedule, and the gradients of one batch with it and without."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from utils.distributed import Distributed, autocast
from utils.training.state import CheckpointState, Progress
from vqvae import VQVAE, VQVAEConfig
from vqvae.adversarial import (
    AdversarialConfig,
    AdversarialLoss,
    DiscriminatorSchedule,
    PatchDiscriminator,
    adaptive_weight,
    diff_augment,
    discriminator_loss,
    generator_loss,
)
from vqvae.losses import LossConfig, ReconstructionLoss
from vqvae.train_step import forward_backward

CPU = partial(autocast, torch.device("cpu"), "fp32")


def make_model() -> VQVAE:
    torch.manual_seed(0)
    config = VQVAEConfig.create(image_size=(16, 16), in_channels=1, channels=32, codebook_size=16)
    return VQVAE(config)


def make_adversarial(**settings: float) -> AdversarialLoss:
    settings = {"disc_weight": 0.8, "disc_layers": 2, "disc_channels": 8, **settings}
    return AdversarialLoss(AdversarialConfig(**settings), 1, (16, 16), total_steps=100)


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
    last_layer = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(
        last_layer.square().sum(), (2 * last_layer).sum(), last_layer, maximum=1e4
    )
    assert float(weight) == pytest.approx(10 / (8**0.5 + 1e-4))
    assert not weight.requires_grad
    assert (
        float(
            adaptive_weight(
                last_layer.square().sum(), (2 * last_layer).sum(), last_layer, maximum=0.5
            )
        )
        == 0.5
    )


def test_each_loss_trains_its_own_side_only() -> None:
    model, adversary = make_model(), make_adversarial()
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    made = model(images).reconstruction
    last = model.decoder.conv_out.weight
    adversary.schedule.strength = 0.5
    term, _ = adversary.generator_term(made, F.mse_loss(made, images), last)
    term.backward()
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert last.grad.abs().sum() > 0
    model.zero_grad()
    adversary.discriminator_term(images, model(images).reconstruction)[0].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in adversary.parameters())


def test_losses_are_in_float32_under_autocast() -> None:
    adversary, images = make_adversarial(lecam_weight=0.1), torch.rand(4, 1, 16, 16)
    with autocast(torch.device("cpu"), "bf16"):
        loss, values = adversary.discriminator_term(images, images)
        assert adversary.discriminator(images).dtype == torch.bfloat16
    assert {loss.dtype, *(value.dtype for value in values.values())} == {torch.float32}


def test_r1_is_the_squared_gradient_at_real_images() -> None:
    plain, penalised = make_adversarial(), make_adversarial(r1_weight=4.0)
    images, made = torch.rand(2, 3, 1, 16, 16)
    slopes = torch.autograd.functional.jacobian(
        lambda x: plain.discriminator(x).sum(dim=(1, 2, 3)), images
    )
    norms = torch.stack([slopes[i, i].square().sum() for i in range(3)])
    difference, logged = penalised.discriminator_term(images, made)
    difference = difference - plain.discriminator_term(images, made)[0]
    expected = 2 * norms.sum() / plain.discriminator(images).numel()
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logged["r1_loss"], expected, rtol=1e-4, atol=1e-6)


def test_r1_is_the_same_for_large_images() -> None:
    """It grew with the number of pixels."""
    config = AdversarialConfig(disc_weight=1.0, disc_layers=2, disc_channels=8, r1_weight=1.0)
    penalties = []
    for side in (32, 128):
        adversary = AdversarialLoss(config, 1, (side, side), total_steps=100)
        torch.manual_seed(0)
        images = torch.rand(4, 1, side, side) * 2 - 1
        penalties.append(float(adversary.discriminator_term(images, images)[1]["r1_loss"]))
    assert penalties[1] < 2 * penalties[0]  # for 16 times as many pixels


def test_a_logit_depends_on_its_own_image_only() -> None:
    images = torch.rand(4, 1, 16, 16)
    adversary = make_adversarial()
    torch.testing.assert_close(adversary.logits_of(images)[:1], adversary.logits_of(images[:1]))


def test_gradients_are_taken_outside_of_autocast_and_losses_within(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, adversary = make_model(), make_adversarial(r1_weight=1.0, disc_adaptive_schedule=False)
    seen: dict[str, list[bool]] = {"grad": [], "losses": []}

    def recorded(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            seen[name].append(torch.is_autocast_enabled("cpu"))
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(torch.autograd, "grad", recorded("grad", torch.autograd.grad))
    losses = recorded("losses", ReconstructionLoss(LossConfig()))
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    bf16 = partial(autocast, torch.device("cpu"), "bf16")
    forward_backward(model, images, losses, bf16, adversary=adversary, step=70)
    assert seen == {"grad": [False] * 3, "losses": [True]}


def test_augmented_images_differ_from_each_other_and_pass_gradients() -> None:
    images = torch.rand(64, 3, 16, 24).mul(2).sub(1).requires_grad_()
    torch.manual_seed(0)
    made = diff_augment(images)
    assert made.shape == images.shape
    assert len(made.mean(dim=(1, 2, 3)).unique()) == 64
    cut = (made == 0).all(dim=1).float().mean()  # a square of half the sides, partly outside
    assert 0.1 < cut < 0.3
    (slope,) = torch.autograd.grad(made.square().sum(), images)
    assert (slope.abs().sum(dim=(1, 2, 3)) > 0).all()
    torch.manual_seed(0)
    assert torch.equal(diff_augment(images), made)


def test_lecam_is_the_distance_from_the_moving_averages_of_the_logits() -> None:
    plain, held = make_adversarial(), make_adversarial(lecam_weight=3.0)
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
    model, adversary = make_model(), make_adversarial(disc_adaptive_max=cap)
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    made = model(images).reconstruction
    last = model.decoder.conv_out.weight
    loss = 1e6 * F.mse_loss(made, images)  # its gradient is far above the adversary's
    adversary.schedule.strength = 0.5
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
        model = make_model()
        acting = {}
        if with_adversary:
            adversary = make_adversarial(disc_adaptive_max=0.0).eval()
            acting = {"adversary": adversary, "step": 70}  # in the ramp
        losses = ReconstructionLoss(LossConfig())
        values, indices = forward_backward(model, images, losses, CPU, accumulate=parts, **acting)
        trained = [*model.parameters(), *(adversary.parameters() if with_adversary else ())]
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        assert len(indices) == 8
        assert values["mse"] * 4 == pytest.approx(float(values["l2_loss"]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_the_generator_is_frozen_while_only_the_discriminator_trains() -> None:
    model, adversary = make_model(), make_adversarial()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    losses = ReconstructionLoss(LossConfig())
    forward_backward(model, images, losses, CPU, accumulate=2, adversary=adversary, step=50)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert any(parameter.grad.abs().sum() > 0 for parameter in adversary.parameters())


def test_before_its_start_the_discriminator_has_no_gradients() -> None:
    model, adversary = make_model(), make_adversarial()
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    losses = ReconstructionLoss(LossConfig())
    values, _ = forward_backward(model, images, losses, CPU, adversary=adversary, step=49)
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert model.decoder.conv_out.weight.grad.abs().sum() > 0
    assert not any("disc" in name for name in values)


def test_the_adaptive_schedule_ramps_up_and_backs_off() -> None:
    config = AdversarialConfig(
        disc_weight=1.0, disc_start=0.5, disc_warmup=0.1, disc_ramp=0.1, disc_bound=0.1
    )
    schedule = DiscriminatorSchedule(config, 1000)
    assert [schedule.phase(step) for step in (0, 499, 500, 599, 600)] == [
        *["reconstruction only"] * 2,
        *["discriminator only"] * 2,
        "joint",
    ]
    assert not schedule.observe(0.02)
    assert not schedule.observe(0.01)
    growth = [schedule.advance() for _ in range(50)]
    assert growth[0] == pytest.approx(0.01)
    assert growth[-1] == pytest.approx(0.5)
    assert not schedule.observe(0.0109)
    assert schedule.observe(0.0111)
    assert schedule.strength == pytest.approx(0.25)
    assert schedule.advance() == pytest.approx(0.255)
    for _ in range(1000):
        schedule.advance()
    assert schedule.strength == 1.0


def test_a_constant_schedule_starts_at_full_strength() -> None:
    # disc_warmup, which would leave no steps of joint training, is not used.
    config = AdversarialConfig(
        disc_weight=1.0, disc_start=0.5, disc_warmup=0.9, disc_adaptive_schedule=False
    )
    schedule = DiscriminatorSchedule(config, 1000)
    assert schedule.phase(500) == "joint"
    assert schedule.advance() == 1.0
    assert not schedule.observe(100.0)


def test_a_discriminator_and_its_optimiser_survive_a_checkpoint(tmp_path: Path) -> None:
    from utils.files import write_folder

    def step(adversary: AdversarialLoss, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        images, made = torch.rand(2, 4, 1, 16, 16)
        adversary.discriminator_term(images, made)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    # Fused, channels_last: moments restored row-major went to other weights than their own.
    first, second = (
        make_adversarial(lecam_weight=0.1).to(memory_format=torch.channels_last) for _ in range(2)
    )
    optimizers = [torch.optim.AdamW(a.parameters(), 1e-2, fused=True) for a in (first, second)]
    step(first, optimizers[0], 1)
    first.schedule.strength, first.schedule.baseline = 0.3, 0.0123456789
    alone = Distributed(0, 1, torch.device("cpu"))
    states = [
        CheckpointState(alone, a, {}, progress=Progress(), optimizer=optimizer)
        for a, optimizer in zip((first, second), optimizers, strict=True)
    ]
    weights = {"model.safetensors": first.state_dict()}
    write_folder(tmp_path / "last", states[0].files() | weights)
    states[1].restore(tmp_path / "last")
    for adversary, optimizer in zip((first, second), optimizers, strict=True):
        step(adversary, optimizer, 2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert vars(second.schedule) == vars(first.schedule)


def test_images_too_small_for_the_discriminator_are_refused() -> None:
    assert PatchDiscriminator(AdversarialConfig(), 3, (28, 28))(torch.rand(2, 3, 28, 28)).shape == (
        2,
        1,
        1,
        1,
    )
    with pytest.raises(ValueError, match="24 pixels"):
        PatchDiscriminator(AdversarialConfig(), 3, (16, 64))


@pytest.mark.parametrize(
    "settings",
    [
        {"disc_start": 1.0, "disc_adaptive_schedule": False},
        {"disc_weight": -1.0},
        {"disc_start": 0.97, "disc_warmup": 0.05},
        {"disc_layers": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        AdversarialConfig(**settings)
