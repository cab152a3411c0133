"""The discriminator: which patches of an image are real?"""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images (B, C, H, W) -> a logit for each patch (B, 1, h', w').

    Convolutions of 4x4, `layers` of stride 2 and two of stride 1, BatchNorm between them.

    Raises:
        ValueError: the images are too small for so many layers.
    """

    def __init__(
        self, in_channels: int, image_size: tuple[int, int], channels: int = 64, layers: int = 3
    ) -> None:
        super().__init__()
        smallest = min(image_size) >> layers
        if smallest < 3:  # each convolution of stride 1 takes one off
            raise ValueError(
                f"a discriminator of {layers} layers needs images of {3 << layers} pixels or more; "
                "use fewer disc_layers"
            )
        parts: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
            ]
            width = wider
        parts += [nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 4, padding=1)]
        self.layers = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, 1, h', w')."""
        return self.layers(images)
