"""The adversarial half of the training: discriminator, losses, and how they are brought in."""

from dataclasses import dataclass
from math import inf

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.discriminator import PatchDiscriminator
from vqvae.losses import ObjectiveConfig


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Loss of logits for real and for made images, of any shape."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """What the made images should make small."""
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last: Tensor, cap: float
) -> Tensor:
    """Ratio of both losses' gradients at the decoder's last weight (arXiv 2012.09841, equation 7).

    A constant in [0, cap], the mean over all processes.
    """
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    ]
    ratio = (norms[0] / (norms[1] + 1e-4)).clamp(0, cap).detach()
    return _mean(ratio)


@dataclass
class Autopilot:
    """How strong the adversarial term is, from step to step; it gives way when images suffer.

    Until `start` there is no discriminator. In the `warmup` steps after that it learns alone, from
    a generator that stands still. Then the strength grows to 1 within `ramp` steps. If at an
    evaluation the validation error is more than `bound` above what it was before, the strength is
    halved, and grows half as fast from there.

    Attributes:
        start, warmup, ramp: in steps.
        bound: relative growth of the error.
        strength: in [0, 1].
        slowness: how many times slower than at first it grows.
        baseline: the last validation error before the adversarial term acted; 0 where not known.
    """

    start: int
    warmup: int
    ramp: int
    bound: float
    strength: float = 0.0
    slowness: float = 1.0
    baseline: float = 0.0

    @classmethod
    def plan(cls, config: ObjectiveConfig, total_steps: int) -> "Autopilot":
        """For a training of so many steps; without autopilot all is there at once."""
        shares = (config.disc_start, config.disc_warmup, config.disc_ramp)
        start, warmup, ramp = (round(share * total_steps) for share in shares)
        if not config.disc_autopilot:
            return cls(start, 0, 0, inf)
        return cls(start, warmup, ramp, config.disc_bound)

    def phase(self, step: int) -> str:
        """`before`, `alone` (the discriminator) or `both`."""
        if step < self.start:
            return "before"
        return "alone" if step < self.start + self.warmup else "both"

    def takes_bearings(self, steps: int) -> bool:
        """Whether after so many steps the validation error is the last before the term acts."""
        return self.bound < inf and steps == self.start + self.warmup

    def advance(self) -> float:
        """The strength of the next step in phase `both`."""
        growth = 1 / (self.ramp * self.slowness) if self.ramp else 1.0
        self.strength = min(1.0, self.strength + growth)
        return self.strength

    def observe(self, error: float) -> bool:
        """Take in a validation error. Was it a reason to step back?"""
        if self.strength == 0:
            self.baseline = error
            return False
        if not self.baseline or error <= self.baseline * (1 + self.bound):
            return False
        self.strength, self.slowness = self.strength / 2, self.slowness * 2
        return True

    def is_blind(self, steps: int) -> bool:
        """Whether evaluations that are so many steps apart may all miss the growth."""
        return self.bound < inf and steps > self.ramp

    def figures(self) -> dict[str, float]:
        """Numbers to log at an evaluation: how strong, and what the error is compared with."""
        known = {"baseline": self.baseline} if self.baseline and self.bound < inf else {}
        return {"strength": self.strength, **known}

    def state(self) -> Tensor:
        """What changes in a training, (3,)."""
        return torch.tensor([self.strength, self.slowness, self.baseline], dtype=torch.float64)

    def set_state(self, state: Tensor) -> None:
        """Go on from `state`."""
        self.strength, self.slowness, self.baseline = state.tolist()


class Adversary(nn.Module):
    """A discriminator, the two losses that it gives, and the autopilot that brings them in.

    Attributes:
        discriminator: what tells real images from made ones.
        autopilot: says from step to step how strong the generator's term is; is part of the state.
    """

    MEMORY = 0.999  # of the moving averages of LeCam

    def __init__(
        self,
        config: ObjectiveConfig,
        in_channels: int,
        image_size: tuple[int, int],
        total_steps: int,
    ) -> None:
        """Build it for images (in_channels, *image_size) and a training of so many steps.

        Raises:
            ValueError: the images are too small for the discriminator.
        """
        super().__init__()
        self.config = config
        self.autopilot = Autopilot.plan(config, total_steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same in every process
            self.discriminator = PatchDiscriminator(
                in_channels, image_size, config.disc_channels, config.disc_layers
            )
        self.register_buffer("logits", torch.zeros(2))  # moving averages: real, made

    def logits_of(self, images: Tensor) -> Tensor:
        """Logits of images (B, C, H, W), in float32 also under autocast."""
        return self.discriminator(images).float()

    def generator_term(
        self, made: Tensor, reconstruction_loss: Tensor, last: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term to add to the generator's loss, and numbers to log.

        Args:
            made: reconstructions (B, C, H, W) with their graph.
            reconstruction_loss: what the term is balanced against, a scalar with its graph.
            last: the decoder's last weight.
        """
        self.discriminator.requires_grad_(False)  # the generator's loss is none of its business
        loss = generator_loss(self.config.disc_loss, self.logits_of(made))
        self.discriminator.requires_grad_(True)
        weight = torch.ones_like(loss)
        if self.config.disc_adaptive_max > 0:
            cap = self.config.disc_adaptive_max
            weight = adaptive_weight(reconstruction_loss, loss, last, cap)
        term = self.autopilot.strength * self.config.disc_weight * weight * loss
        return term, {"adversarial_loss": term.detach(), "adaptive_weight": weight}

    def discriminator_term(self, images: Tensor, made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on real and made images (B, C, H, W), and numbers to log."""
        images = images.detach().requires_grad_(self.config.r1_weight > 0)
        real, fake = self.logits_of(images), self.logits_of(made.detach())
        loss = discriminator_loss(self.config.disc_loss, real, fake)
        values = {
            "disc_loss": loss.detach(),
            "disc_real": real.detach().mean(),
            "disc_fake": fake.detach().mean(),
        }
        if self.config.lecam_weight > 0:  # arXiv 2104.03310, equation 5
            averages = torch.stack([values["disc_real"], values["disc_fake"]])
            self.logits.lerp_(_mean(averages), 1 - self.MEMORY)
            distance = (real - self.logits[1]).relu().square().mean()
            distance = distance + (self.logits[0] - fake).relu().square().mean()
            values["lecam_loss"] = self.config.lecam_weight * distance.detach()
            loss = loss + self.config.lecam_weight * distance
        if self.config.r1_weight > 0:  # arXiv 1801.04406, equation 9
            (slope,) = torch.autograd.grad(real.sum(), images, create_graph=True)
            penalty = slope.square().sum(dim=(1, 2, 3)).mean()
            values["r1_loss"] = self.config.r1_weight / 2 * penalty.detach()
            loss = loss + self.config.r1_weight / 2 * penalty
        return loss, values

    def get_extra_state(self) -> Tensor:
        """What the autopilot has learned, for the state dict."""
        return self.autopilot.state()

    def set_extra_state(self, state: Tensor) -> None:
        self.autopilot.set_state(state)

    def average_gradients(self) -> None:
        """Give the discriminator of every process the mean of all their gradients."""
        for parameter in self.discriminator.parameters():
            if parameter.grad is not None:
                _mean(parameter.grad)


def make_adversary(
    config: ObjectiveConfig, in_channels: int, image_size: tuple[int, int], total_steps: int
) -> Adversary | None:
    """None where the adversarial term has no weight.

    Raises:
        ValueError: see `Adversary`.
    """
    if config.disc_weight == 0:
        return None
    return Adversary(config, in_channels, image_size, total_steps)


def _mean(values: Tensor) -> Tensor:
    """The mean over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
