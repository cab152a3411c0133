"""What a tokenizer is trained to make small: distances of pixels and of what they look like."""

from dataclasses import dataclass, field
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.perceptual import BACKBONES, PerceptualLoss

LEAST_SIDE = 32  # pixels that are enough for every backbone of LPIPS


@dataclass(frozen=True)
class ObjectiveConfig:
    """Start, terms and average of a tokenizer's training.

    A term of weight 0 is neither built nor computed. A field's `needs` is another field, without
    which it does nothing.

    Raises:
        ValueError: a value is out of its range.
    """

    init_from: str = field(
        default="",
        metadata={
            "help": "tokenizer to start from: its weights and settings, with a new optimiser; "
            "--image_size may be another, and what makes no difference to the network"
        },
    )
    codebook_rescue: bool = field(
        default=False,
        metadata={"help": "restart the codes from the data when few of them are in use"},
    )
    l1_weight: float = field(default=0.0, metadata={"help": "of |x - x'|, images in [-1, 1]"})
    l2_weight: float = field(default=1.0, metadata={"help": "of |x - x'|^2, images in [-1, 1]"})
    perceptual_weight: float = field(
        default=0.0, metadata={"help": "of LPIPS; 1 in VQGAN; needs the package lpips"}
    )
    lpips_network: str = field(
        default="vgg",
        metadata={
            "help": "LPIPS backbone",
            "choices": tuple(BACKBONES),
            "needs": "perceptual_weight",
        },
    )
    lpips_weights: str = field(
        default="",
        metadata={
            "help": "torchvision's weights of --lpips_network; default: downloads them",
            "needs": "perceptual_weight",
        },
    )
    disc_weight: float = field(
        default=0.0, metadata={"help": "of the adversarial term; 0.8 in VQGAN, 0: no discriminator"}
    )
    disc_loss: str = field(
        default="hinge",
        metadata={
            "help": "of the discriminator",
            "choices": ("hinge", "vanilla", "non_saturating"),
            "needs": "disc_weight",
        },
    )
    disc_start: float = field(
        default=0.5,
        metadata={"help": "share of the training without a discriminator", "needs": "disc_weight"},
    )
    disc_autopilot: bool = field(
        default=True,
        metadata={
            "help": "bring the adversarial term in gently; without: in full from --disc_start on",
            "needs": "disc_weight",
        },
    )
    disc_warmup: float = field(
        default=0.05,
        metadata={
            "help": "autopilot: share of the training with the discriminator alone",
            "needs": "disc_autopilot",
        },
    )
    disc_ramp: float = field(
        default=0.2,
        metadata={
            "help": "autopilot: share of the training in which the term grows to its weight",
            "needs": "disc_autopilot",
        },
    )
    disc_bound: float = field(
        default=0.1,
        metadata={
            "help": "autopilot: step back if the validation mse grows by more than this",
            "needs": "disc_autopilot",
        },
    )
    disc_adaptive_max: float = field(
        default=1e4,
        metadata={
            "help": "cap of the adaptive weight of the adversarial term; 0: not adaptive",
            "needs": "disc_weight",
        },
    )
    disc_channels: int = field(
        default=64, metadata={"help": "width of the discriminator", "needs": "disc_weight"}
    )
    disc_layers: int = field(
        default=3, metadata={"help": "halvings in the discriminator", "needs": "disc_weight"}
    )
    lecam_weight: float = field(
        default=0.0, metadata={"help": "of the LeCam regulariser", "needs": "disc_weight"}
    )
    r1_weight: float = field(
        default=0.0, metadata={"help": "of the R1 gradient penalty", "needs": "disc_weight"}
    )

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        for name, value in numbers.items():
            if not 0 <= value < inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {value}")
        if self.l1_weight + self.l2_weight + self.perceptual_weight == 0:
            raise ValueError("one of l1_weight, l2_weight, perceptual_weight must be above 0")
        alone = self.disc_warmup if self.disc_autopilot else 0.0
        if self.disc_start + alone >= 1:
            raise ValueError(
                "disc_start (with the autopilot + disc_warmup) must leave a part of the training, "
                "below 1"
            )
        if min(self.disc_channels, self.disc_layers) < 1:
            raise ValueError("disc_channels and disc_layers must be at least 1")


class ReconstructionLoss(nn.Module):
    """The weighted terms that compare a reconstruction with its image.

    Raises:
        OSError, ImportError: see `PerceptualLoss`.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = None
        if config.perceptual_weight > 0:
            self.perceptual = PerceptualLoss(config.lpips_network, config.lpips_weights)

    @torch.no_grad()
    def check(self, channels: int, image_size: tuple[int, int]) -> None:
        """Try the terms on images of this size.

        Raises:
            ValueError: they are too small for LPIPS.
        """
        device = next(self.parameters(), torch.empty(0)).device
        images = torch.zeros(1, channels, *image_size, device=device)
        try:
            self(images, images)
        except RuntimeError as error:
            height, width = image_size
            raise ValueError(
                f"images of {height}x{width} pixels are too small for LPIPS through "
                f"{self.config.lpips_network}; use a larger --image_size ({LEAST_SIDE} is enough), "
                "or --perceptual_weight 0"
            ) from error

    def forward(self, reconstructions: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Both (B, C, H, W), images in [-1, 1] -> terms that are to be added up, by name."""
        terms = {}
        if self.config.l1_weight > 0:
            terms["l1"] = self.config.l1_weight * F.l1_loss(reconstructions, images)
        if self.config.l2_weight > 0:
            terms["l2"] = self.config.l2_weight * F.mse_loss(reconstructions, images)
        if self.perceptual is not None:
            distance = self.perceptual(reconstructions, images).mean()
            terms["perceptual"] = self.config.perceptual_weight * distance
        return terms
