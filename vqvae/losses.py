"""Reconstruction losses of the tokenizer: L1, L2 and LPIPS, and their flags."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.quantizers.base import check_fields, option

BACKBONES = {"vgg": "vgg16", "alex": "alexnet"}  # of LPIPS: torchvision's name of the network
MIN_SIDES = {"vgg": 16, "alex": 31}  # pixels; smaller images vanish in the backbone


@dataclass(frozen=True)
class LossConfig:
    """Weights of the reconstruction terms; a term of weight 0 is neither built nor computed."""

    l1_weight: float = option(0.0, "weight of |x - x'|, images in [-1, 1]")
    l2_weight: float = option(1.0, "weight of |x - x'|^2, images in [-1, 1]")
    perceptual_weight: float = option(0.0, "weight of LPIPS (1 in VQGAN); needs the package lpips")
    lpips_network: str = option(
        "vgg", "LPIPS backbone", choices=tuple(BACKBONES), needs="perceptual_weight"
    )
    lpips_weights: str = option(
        "", "torchvision's weights for lpips_network; default: download", needs="perceptual_weight"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.l1_weight + self.l2_weight + self.perceptual_weight == 0:
            raise ValueError("one of l1_weight, l2_weight, perceptual_weight must be above 0")


class ReconstructionLoss(nn.Module):
    """The weighted terms that compare a reconstruction with its image."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = None
        if config.perceptual_weight > 0:
            self.perceptual = PerceptualLoss(config.lpips_network, config.lpips_weights)

    def check(self, image_size: tuple[int, int]) -> None:
        """A ValueError if images of this size are too small for LPIPS."""
        least = MIN_SIDES[self.config.lpips_network] if self.perceptual is not None else 0
        if min(image_size) < least:
            raise ValueError(
                f"LPIPS with lpips_network {self.config.lpips_network} needs images of at least "
                f"{least}x{least} pixels; use a larger image_size, or perceptual_weight 0"
            )

    def forward(self, reconstructions: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Both (B, C, H, W) in [-1, 1] -> weighted scalar terms by name; the loss is their sum."""
        config, terms = self.config, {}
        if config.l1_weight > 0:
            terms["l1"] = config.l1_weight * F.l1_loss(reconstructions, images)
        if config.l2_weight > 0:
            terms["l2"] = config.l2_weight * F.mse_loss(reconstructions, images)
        if self.perceptual is not None:
            distances = self.perceptual(reconstructions, images)
            terms["perceptual"] = config.perceptual_weight * distances.mean()
        return terms


class PerceptualLoss(nn.Module):
    """LPIPS (arXiv 1801.03924): distance of two images' activations in a pretrained network.

    The package lpips (else an ImportError) brings its linear heads. `weights` is torchvision's file
    of the backbone's; "" downloads it; an OSError if that fails, or it is of another network.
    Without `pretrained`, for benchmarks, the cost is the same, but distances are meaningless.
    """

    def __init__(self, network: str = "vgg", weights: str = "", *, pretrained: bool = True) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError("LPIPS needs the package lpips: pip install lpips") from error
        with warnings.catch_warnings(action="ignore"):  # lpips uses a deprecated torchvision API
            self.lpips = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        if pretrained:
            load_backbone(self.lpips.net, network, weights)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """LPIPS is not trained: it stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches (B, C, H, W) in [-1, 1], C of 1, 3 or 4 (alpha ignored) -> distances (B,)."""
        images, others = (x[:, :3].expand(-1, 3, -1, -1) for x in (images, others))
        return self.lpips(images, others).flatten().float()  # also under autocast


def load_backbone(module: nn.Module, network: str, path: str) -> None:
    """Load the pretrained convolutions of a network into lpips' module, from a file or download."""
    from torchvision import models  # slow to import

    weights = models.get_model_weights(BACKBONES[network]).IMAGENET1K_V1
    try:
        with warnings.catch_warnings(action="ignore"):  # of unusual pickles
            if path:
                state = torch.load(path, map_location="cpu", weights_only=True)
            else:
                options = {"check_hash": True, "weights_only": True, "map_location": "cpu"}
                state = weights.get_state_dict(**options)
        # lpips has "slice<i>.<layer>.weight" where torchvision has "features.<layer>.weight".
        layers = {key: f"features.{key.partition('.')[2]}" for key in module.state_dict()}
        module.load_state_dict({key: state[layer] for key, layer in layers.items()})
    except Exception as error:  # no network, no such file, or a file of anything
        line = " ".join(str(error).split())[:150]
        raise OSError(
            f"LPIPS needs the weights of {network}, which {path or 'the download'} does not hold "
            f"({line}); download {weights.url} and pass its path as lpips_weights, or do without "
            "LPIPS"
        ) from error
