"""Perceptual distance by the package lpips, whose backbone comes from torchvision."""

import warnings

import torch
from torch import Tensor, nn
from torchvision import models

# name: (torchvision's network, its weights)
BACKBONES = {
    "vgg": (models.vgg16, models.VGG16_Weights.IMAGENET1K_V1),
    "alex": (models.alexnet, models.AlexNet_Weights.IMAGENET1K_V1),
}


class PerceptualLoss(nn.Module):
    """LPIPS (arXiv 1801.03924): distance of the images' activations in a trained network.

    Raises:
        ImportError: the package lpips is not installed.
        OSError: the backbone's weights are neither there nor can be downloaded, or the file holds
            others.
    """

    def __init__(
        self,
        network: str = "vgg",
        weights: str = "",
        *,
        trained: bool = True,
        otherwise: str = "use --perceptual_weight 0",
    ) -> None:
        """Build LPIPS.

        Args:
            network: of `BACKBONES`.
            weights: torchvision's file of the network; "" downloads it.
            trained: False leaves the network as it is initialised, which costs as much and means
                nothing: for benchmarks.
            otherwise: what a user without the weights can do, for the message.
        """
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError("LPIPS needs the package lpips: pip install lpips") from error
        features = _read_features(network, weights, otherwise) if trained else {}
        with warnings.catch_warnings():  # it builds the network in torchvision's former way
            warnings.simplefilter("ignore")
            self.lpips = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        for part in self.lpips.net.children() if trained else ():
            for number, layer in part.named_children():
                for name, parameter in layer.named_parameters():
                    parameter.data.copy_(features[f"{number}.{name}"])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """LPIPS is not trained: it stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches (B, C, H, W) in [-1, 1], C of 1, 3 or 4 (alpha ignored) -> distances (B,)."""
        images, others = (x[:, :3].expand(-1, 3, -1, -1) for x in (images, others))
        return self.lpips(images, others).flatten()


def _read_features(network: str, path: str, otherwise: str) -> dict[str, Tensor]:
    """The trained weights of the convolutional part of torchvision's network."""
    make, weights = BACKBONES[network]
    remedy = f"download {weights.url} and give its path as --lpips_weights, or {otherwise}"
    try:
        if path:
            with warnings.catch_warnings(action="ignore"):  # of odd pickles, beside the error
                state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = weights.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, no such file, or no weights: of many types
        line = " ".join(str(error).split())[:150]
        raise OSError(f"LPIPS needs the weights of {network} ({line}); {remedy}") from error
    try:
        prefix = "features."
        state = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        with torch.device("meta"):
            features = make().features
        features.load_state_dict(state, assign=True)  # has it all, in the right shapes?
    except Exception as error:  # whatever else was in the file
        where = path or "the download"
        raise OSError(f"{where} does not hold the weights of {network}; {remedy}") from error
    return state
