"""What a network sees in a set of images, by which sets are compared."""

import hashlib
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.evaluation import classifier
from utils.evaluation.classifier import Images

NETWORKS = ("classifier", "inception", "dinov2")
PIXEL_SIDE = 32  # at most, where pixels are compared


class Seen(NamedTuple):
    """A set of N images as a network sees it, on the device of the mathematics.

    Attributes:
        features: (N, D), float32.
        logits: (N, classes), or None where the network has no classes.
        pixels: (N, C * h * w), uint8, of the images shrunk to at most 32 pixels a side.
    """

    features: Tensor
    logits: Tensor | None
    pixels: Tensor

    def pick(self, rows: Tensor) -> "Seen":
        """Some of the images."""
        rows = rows.to(self.features.device)
        logits = None if self.logits is None else self.logits[rows]
        return Seen(self.features[rows], logits, self.pixels[rows])


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, and what its figures must be called.

    Attributes:
        name: of `NETWORKS`.
        network: images (B, C, H, W) in [-1, 1] -> features (B, D) and logits or None.
        preprocessing: what happens to an image before the network, in words.
        class_names: of the classifier, in the order of its logits.
    """

    name: str
    network: nn.Module
    preprocessing: str
    class_names: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, str]:
        """The names of Frechet distance, kernel distance and class score in this network."""
        if self.name == "inception":
            return {"frechet": "fid", "kernel": "kid", "score": "inception_score"}
        return {
            "frechet": f"fd_{self.name}",
            "kernel": f"kd_{self.name}",
            "score": f"class_score_{self.name}",
        }

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return weights_sha256(self.network)

    def warn_of_few(self, seen: Seen) -> None:
        """Say so where a set is too small for a Frechet distance that means something."""
        count, dimensions = seen.features.shape
        if count <= dimensions:
            print(
                f"warning: the Frechet distance of {count} images by the {dimensions:,} features "
                f"of {self.name} is mostly noise; compare more than {dimensions:,}",
                file=sys.stderr,
            )


def weights_sha256(network: nn.Module) -> str:
    """The SHA-256 of all weights of a network, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def taught_network(
    images: Images, rows: Tensor, what: str, device: torch.device, seed: int
) -> FeatureNetwork:
    """The classifier of labelled images, see `classifier.taught`; `what` names them in errors."""
    model = classifier.taught(images, rows, what, device, seed)
    preprocessing = f"bilinear shrinking to at most {classifier.MAX_SIDE} pixels a side"
    return FeatureNetwork("classifier", model, preprocessing, model.config.class_names)


def _shrink(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, C * h * w), uint8, of at most 32 pixels a side."""
    scale = PIXEL_SIDE / max(images.shape[2:])
    if scale < 1:
        size = [max(1, math.floor(side * scale)) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).flatten(1)


@torch.inference_mode()
def look(
    network: FeatureNetwork,
    images: Images,
    rows: Tensor,
    device: torch.device,
    batch_size: int,
    what: str,
) -> Seen:
    """What a network sees in the given rows of a source of images; `what` names the progress."""
    # Distances are computed in float64, which only CUDA and the CPU have.
    home = device if device.type == "cuda" else torch.device("cpu")
    parts = []
    with tqdm(total=len(rows), desc=what, unit=" images", disable=None) as bar:
        for batch in images.batches(rows.split(batch_size), device):
            features, logits = network.network(batch)
            logits = None if logits is None else logits.float().to(home)
            parts.append((features.float().to(home), logits, _shrink(batch).to(home)))
            bar.update(len(batch))
    features, logits, pixels = zip(*parts, strict=True)
    return Seen(
        torch.cat(features), None if logits[0] is None else torch.cat(logits), torch.cat(pixels)
    )
