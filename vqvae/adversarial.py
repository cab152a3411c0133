"""Adversarial loss of the tokenizer: PatchGAN, adaptive weight, LeCam, R1, and their schedule."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.quantizers.base import all_reduce_mean, check_fields, option

LECAM_DECAY = 0.999  # of the moving averages of the logits
LOSSES = ("hinge", "vanilla", "non_saturating")
ADAPTIVE = "disc_adaptive_schedule"


def _part(default: Any, description: str, needs: str = "disc_weight", **metadata: Any) -> Any:
    return option(default, description, needs=needs, **metadata)


@dataclass(frozen=True)
class AdversarialConfig:
    """Discriminator, its losses and its schedule; `disc_weight` 0 trains without one."""

    disc_weight: float = option(0.0, "weight of the adversarial loss; VQGAN: 0.8")
    disc_loss: str = _part("hinge", "loss of the discriminator", choices=LOSSES)
    disc_start: float = _part(0.5, "fraction of the training without it")
    disc_adaptive_schedule: bool = _part(True, "ramp up, and down where the error rises")
    disc_warmup: float = _part(0.05, "fraction for the discriminator", ADAPTIVE)
    disc_ramp: float = _part(0.2, "fraction for the ramp up", ADAPTIVE)
    disc_bound: float = _part(0.1, "tolerated rise of the error, a fraction", ADAPTIVE)
    disc_adaptive_max: float = _part(1e4, "maximum of the adaptive weight; 0: none")
    disc_learning_rate: float = _part(2e-4, "learning rate of the discriminator")
    disc_augment: bool = _part(False, "DiffAugment, for small data sets")
    disc_channels: int = _part(64, "width of the discriminator", min=1)
    disc_layers: int = _part(3, "downsampling layers of the discriminator", min=1)
    lecam_weight: float = _part(0.0, "weight of LeCam")
    r1_weight: float = _part(0.0, "weight of the R1 penalty, per logit")

    def __post_init__(self) -> None:
        check_fields(self)
        warmup = self.disc_warmup if self.disc_adaptive_schedule else 0.0
        if self.disc_start + warmup >= 1:
            raise ValueError("disc_start plus disc_warmup must be below 1")


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator's logits for real and reconstructed images, of any shape."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """Loss of the generator, given the logits for its reconstructions, of any shape."""
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, maximum: float
) -> Tensor:
    """Ratio of two losses' gradient norms at the last layer (arXiv 2012.09841, equation 7).

    A constant in [0, maximum], averaged over all processes.
    """
    losses = reconstruction, adversarial
    first, second = (gradient(x, last_layer, retain_graph=True).norm() for x in losses)
    return all_reduce_mean((first / (second + 1e-4)).clamp(0, maximum).detach())


def gradient(loss: Tensor, inputs: Tensor, **options: Any) -> Tensor:
    """The gradient of a scalar; autocast is for forward passes only and is off meanwhile."""
    with torch.autocast(inputs.device.type, enabled=False):
        return torch.autograd.grad(loss, inputs, **options)[0]


def diff_augment(images: Tensor) -> Tensor:
    """Differentiable augmentation (arXiv 2006.10738) of images (B, C, H, W) in [-1, 1].

    Brightness, saturation and contrast; a shift of up to an eighth; a grey square of half the side.
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(batch, *(shape or (1, 1, 1)), device=images.device).uniform_(low, high)

    images = images + uniform(-0.5, 0.5)
    for axes, low, high in (((1,), 0.0, 2.0), ((1, 2, 3), 0.5, 1.5)):
        mean = images.mean(dim=axes, keepdim=True)
        images = mean + (images - mean) * uniform(low, high)
    size = torch.tensor([width, height], device=images.device)
    shift = torch.eye(2, 3, device=images.device).repeat(batch, 1, 1)
    shift[:, :, 2] = 2 * (uniform(-1, 1, 2) * size / 8).round() / size  # the side has length 2
    places = F.affine_grid(shift, [*images.shape], align_corners=False)
    images = F.grid_sample(images, places, mode="nearest", align_corners=False)
    cx, cy = (uniform(0, 1, 2) * size).unbind(1)  # centres of the squares
    outside_y = (torch.arange(height, device=images.device) - cy[:, None]).abs() > height / 4
    outside_x = (torch.arange(width, device=images.device) - cx[:, None]).abs() > width / 4
    return images * (outside_y[:, None, :, None] | outside_x[:, None, None, :])


class DiscriminatorSchedule:
    """Strength of the adversarial loss from step to step.

    Before `start` only the tokenizer trains, for the next `warmup` steps only the discriminator,
    against the frozen tokenizer. After that both train, and the strength grows linearly to 1 within
    `ramp` steps. Whenever an evaluation finds the validation error more than `bound` above the
    baseline (the last error before joint training), the strength and its growth are halved.
    """

    def __init__(self, config: AdversarialConfig, total_steps: int) -> None:
        self.adaptive, self.bound = config.disc_adaptive_schedule, config.disc_bound
        self.start = round(config.disc_start * total_steps)
        self.warmup = round(config.disc_warmup * total_steps) * self.adaptive
        self.ramp = round(config.disc_ramp * total_steps) * self.adaptive
        self.strength, self.ramp_factor = 0.0, 1.0
        self.baseline = 0.0  # 0: not known yet

    def phase(self, step: int) -> str:
        """What step `step` (from 0) trains: "discriminator only", for example."""
        if step < self.start:
            return "reconstruction only"
        return "discriminator only" if step < self.start + self.warmup else "joint"

    def needs_baseline(self, steps: int) -> bool:
        """Whether the baseline evaluation is due after `steps` steps: joint training is next."""
        return self.adaptive and steps == self.start + self.warmup

    def advance(self) -> float:
        """Move one step of joint training forward; the strength of that step."""
        growth = 1 / (self.ramp * self.ramp_factor) if self.ramp else 1.0
        self.strength = min(1.0, self.strength + growth)
        return self.strength

    def observe(self, error: float) -> bool:
        """Account for a validation error; whether the strength was reduced because of it."""
        if self.strength == 0:
            self.baseline = error
        worse = self.adaptive and 0 < self.baseline * (1 + self.bound) < error
        if worse:
            self.strength, self.ramp_factor = self.strength / 2, self.ramp_factor * 2
        return worse

    def metrics(self) -> dict[str, float]:
        """Numbers to log at an evaluation."""
        baseline = {"disc_baseline": self.baseline} if self.baseline and self.adaptive else {}
        return {"disc_strength": self.strength, **baseline}


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images (B, C, H, W) -> a logit for each patch (B, 1, h', w').

    4x4 convolutions, `disc_layers` of stride 2 and two of stride 1. GroupNorm between them, in
    place of BatchNorm: a logit depends on its own image only, in any batch and with R1.
    """

    def __init__(
        self, config: AdversarialConfig, in_channels: int, image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        layers = config.disc_layers
        if min(image_size) >> layers < 3:  # each convolution of stride 1 removes one position
            raise ValueError(
                f"disc_layers {layers} need images of {3 << layers} pixels or more; "
                "use fewer disc_layers"
            )
        width = config.disc_channels
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1)]
        for layer in range(1, layers + 1):
            before, width = width, config.disc_channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            conv = nn.Conv2d(before, width, 4, stride, padding=1, bias=False)
            parts += [nn.LeakyReLU(0.2), conv, nn.GroupNorm(gcd(width, 8), width)]
        parts += [nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 4, padding=1)]
        self.layers = nn.Sequential(*parts)
        for part in parts:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class AdversarialLoss(nn.Module):
    """A discriminator of images (in_channels, *image_size), losses of both sides, a schedule."""

    logits: Tensor  # moving averages of the logits of real and fake images, (2,)

    def __init__(
        self,
        config: AdversarialConfig,
        in_channels: int,
        image_size: tuple[int, int],
        total_steps: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.schedule = DiscriminatorSchedule(config, total_steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same in every process
            self.discriminator = PatchDiscriminator(config, in_channels, image_size)
        self.register_buffer("logits", torch.zeros(2))

    def logits_of(self, images: Tensor) -> Tensor:
        """Logits of images (B, C, H, W), in float32 also under autocast."""
        shown = diff_augment(images) if self.config.disc_augment else images
        return self.discriminator(shown).float()

    def generator_term(
        self, reconstructions: Tensor, reconstruction_loss: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term to add to the generator's loss, and numbers to log.

        The reconstructions (B, C, H, W) and their loss come with their graph, which begins at
        `last_layer`, the weight of the decoder's last convolution.
        """
        self.discriminator.requires_grad_(False)  # this loss trains the generator alone
        loss = generator_loss(self.config.disc_loss, self.logits_of(reconstructions))
        self.discriminator.requires_grad_(True)
        weight, maximum = torch.ones_like(loss), self.config.disc_adaptive_max
        if maximum > 0:
            weight = adaptive_weight(reconstruction_loss, loss, last_layer, maximum)
        term = self.schedule.strength * self.config.disc_weight * weight * loss
        return term, {"adversarial_loss": term.detach(), "adaptive_weight": weight}

    def discriminator_term(
        self, images: Tensor, reconstructions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, given both (B, C, H, W), and numbers to log."""
        images = images.detach().requires_grad_(self.config.r1_weight > 0)
        real, fake = self.logits_of(images), self.logits_of(reconstructions.detach())
        terms = {"disc_loss": discriminator_loss(self.config.disc_loss, real, fake)}
        means = torch.stack([real.detach().mean(), fake.detach().mean()])
        if self.config.lecam_weight > 0:  # arXiv 2104.03310, equation 5
            self.logits.lerp_(all_reduce_mean(means.clone()), 1 - LECAM_DECAY)
            above, below = (real - self.logits[1]).relu(), (self.logits[0] - fake).relu()
            distance = above.square().mean() + below.square().mean()
            terms["lecam_loss"] = self.config.lecam_weight * distance
        if self.config.r1_weight > 0:  # arXiv 1801.04406, equation 9
            # Its square grows with the number of logits, to which the weight therefore applies.
            slope = gradient(real.sum(), images, create_graph=True)
            penalty = slope.square().sum() / real.numel()
            terms["r1_loss"] = self.config.r1_weight / 2 * penalty
        logged = {"disc_real": means[0], "disc_fake": means[1]}
        logged |= {name: term.detach() for name, term in terms.items()}
        return torch.stack([*terms.values()]).sum(), logged

    def get_extra_state(self) -> Tensor:
        """The schedule's strength, ramp factor and baseline, (3,)."""
        one = self.schedule
        return torch.tensor([one.strength, one.ramp_factor, one.baseline], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        one = self.schedule
        one.strength, one.ramp_factor, one.baseline = state.tolist()

    def average_gradients(self) -> None:
        """Average the discriminator's gradients over all processes."""
        for parameter in self.discriminator.parameters():
            if parameter.grad is not None:
                all_reduce_mean(parameter.grad)
