"""Features of sets of images, and the classifier that gives them where nothing is downloaded.

The classifier is trained on the labels of the data set itself in about a minute. A cache keeps it
under a key of the data, the seed and the content of this file.
"""

import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.cli import UserError, first_few
from utils.data.sources import Row, epoch_order
from utils.evaluation.metrics import SHARE, Estimate, estimate

NETWORKS = ("classifier", "inception", "dinov2")
PIXEL_SIDE = 32  # at most, where pixels are compared
CACHE = Path("outputs/cache")
TRAINING_IMAGES, MAX_EPOCHS = 180_000, 30  # of the classifier, but each at most 30 times
BATCH, PEAK_RATE = 128, 4e-3
MAX_SIDE = 64  # pixels; the classifier shrinks larger images
FEW_IMAGES = 10  # of a class, too few to learn it
UNKNOWN = -1  # number of a class without training images
MAX_RESERVED = 3  # one in so many training images at most is kept from the classifier


class Images(Protocol):
    """A source of images, such as an `ImageDataset`."""

    channels: int
    size: tuple[int, int]

    @property
    def rows(self) -> Sequence[Row]: ...

    def __len__(self) -> int: ...

    def batches(
        self, batches_of_rows: Sequence[Tensor], device: torch.device
    ) -> Iterator[Tensor]: ...


@dataclass
class DecodedImages:
    """Grids of indices (N, h, w[, depth]) as a source of images, decoded by their tokenizer."""

    grids: Tensor
    rows: Sequence[Row]
    decode: Callable[[Tensor], Tensor]
    channels: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.grids)

    @torch.no_grad()
    def batches(self, batches_of_rows: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images of each batch of row numbers, (B, C, H, W) in [-1, 1].

        Their values are those of 8-bit images, as if they had been saved and read.
        """
        for rows in batches_of_rows:
            images = self.decode(self.grids[rows].long().to(device))
            yield images.add(1).mul(127.5).round().div(127.5).sub(1)


class ImageSet(NamedTuple):
    """Some rows of a source of images."""

    images: Images
    row_numbers: Tensor

    @classmethod
    def whole(cls, images: Images) -> "ImageSet":
        """All rows."""
        return cls(images, torch.arange(len(images)))

    @property
    def rows(self) -> list[Row]:
        """The rows of the table."""
        return [self.images.rows[row] for row in self.row_numbers.tolist()]

    def sample(self, count: int, seed: int) -> "ImageSet":
        """`count` random rows."""
        chosen = epoch_order(self.row_numbers, seed, 0)[:count].sort().values
        return ImageSet(self.images, chosen)

    def without(self, other: "ImageSet") -> "ImageSet":
        """The rows that `other`, a set of the same source, does not have."""
        shared = torch.isin(self.row_numbers, other.row_numbers)
        return ImageSet(self.images, self.row_numbers[~shared])

    def load(self, positions: Tensor, device: torch.device) -> Tensor:
        """The images at some positions of the rows, (n, C, H, W) in [-1, 1]."""
        return next(iter(self.images.batches([self.row_numbers[positions.cpu()]], device)))


class Settings(NamedTuple):
    """Where and in which batches networks run; `seed` of resamples and random choices."""

    device: torch.device
    batch_size: int
    seed: int


class Features(NamedTuple):
    """A set of N images in a feature network."""

    features: Tensor  # (N, D), float32
    logits: Tensor | None  # (N, classes), or None where the network has no classes
    pixels: Tensor  # (N, C * h * w), uint8, of the images shrunk to at most 32 pixels a side


@dataclass(frozen=True)
class FeatureNetwork:
    """Images (B, C, H, W) in [-1, 1] -> features (B, D) and logits (B, classes) or None."""

    name: str  # of `NETWORKS`
    network: nn.Module
    preprocessing: str  # of an image before the network, in words
    class_names: tuple[str, ...] = ()  # of the classifier, in the order of its logits

    @property
    def protocol(self) -> dict[str, str]:
        """What an evaluation states about it."""
        return {
            "features": self.name,
            "network_sha256": weights_sha256(self.network),
            "network_preprocessing": self.preprocessing,
        }


def weights_sha256(network: nn.Module) -> str:
    """The SHA-256 of all weights of a network, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def extract_features(
    network: FeatureNetwork, part: ImageSet, settings: Settings, what: str
) -> Features:
    """The features of a set of images; `what` labels the progress bar."""
    device, batches = settings.device, part.row_numbers.split(settings.batch_size)
    # Distances are computed in float64, which only CUDA and the CPU have.
    home = device if device.type == "cuda" else torch.device("cpu")
    parts = []
    with tqdm(total=len(part.row_numbers), desc=what, unit=" images", disable=None) as bar:
        for images in part.images.batches(batches, device):
            features, logits = network.network(images)
            pixels = _shrink(images, PIXEL_SIDE).clamp(-1, 1).add(1).mul(127.5).round()
            found = features.float(), logits, pixels.to(torch.uint8).flatten(1)
            parts.append([None if one is None else one.to(home) for one in found])
            bar.update(len(images))
    columns = zip(*parts, strict=True)
    return Features(*(None if one[0] is None else torch.cat(one) for one in columns))


def _shrink(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> the same, or shrunk to `side` pixels along the longer side."""
    scale = side / max(images.shape[2:])
    if scale >= 1:
        return images
    size = [max(1, math.floor(length * scale)) for length in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def label_agreement(found: Features, targets: Tensor, weights: Tensor) -> Estimate:
    """The share of N images that a classifier assigns to their target class (N,).

    Images with the target `UNKNOWN` do not count.
    """
    assert found.logits is not None
    right, known = found.logits.argmax(dim=1).cpu() == targets, targets != UNKNOWN
    sums = [weights.cpu().double() @ one.double() for one in (right, known)]
    return estimate(sums[0] / sums[1].clamp(min=1), SHARE)


def print_accuracy(accuracy: Estimate, count: int) -> None:
    """Print the `label_agreement` of the classifier on held-out real images."""
    percent = 100 * accuracy.value
    print(f"classifier: {percent:.1f} % of the labels of {count:,} held-out images right")


def warn(text: str) -> None:
    """Print what to keep in mind when reading the metrics."""
    print(f"warning: {text}", file=sys.stderr)


def warn_if_few(features: Features, name: str) -> None:
    """Warn where a set is too small for a meaningful Frechet distance in the network `name`."""
    count, dimensions = features.features.shape
    if count <= dimensions:
        warn(
            f"the Frechet distance of {count} images by the {dimensions:,} features of {name} is "
            f"mostly noise; compare more than {dimensions:,}"
        )


# --- the classifier of a data set ---------------------------------------------------------------


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> features (B, 128) and logits (B, classes).

    Over the training images each feature has about mean 0 and variance 1.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(2048, 128)),
            nn.BatchNorm1d(128, affine=False),  # one scale, for distances and kernels
        )
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(_shrink(images, MAX_SIDE))
        return features, self.head(features.relu())


def class_targets(rows: Sequence[Row], names: Sequence[str], what: str) -> Tensor:
    """The number of each image's class, (N,); `UNKNOWN` for classes without training images."""
    numbers = {name: number for number, name in enumerate(names)}
    targets = torch.tensor([numbers.get(row.label, UNKNOWN) for row in rows])
    unknown = sorted({row.label for row in rows} - numbers.keys())
    left_out = int((targets == UNKNOWN).sum())
    if left_out == len(rows):
        raise UserError(
            f"the classifier was not trained on the labels {first_few(unknown)} of {what}; give "
            "data of the same classes"
        )
    if unknown:
        warn(
            f"label_agreement leaves out {left_out:,} of {len(rows):,} images of {what}, whose "
            f"classes the classifier has no training images of: {first_few(unknown)}"
        )
    return targets


def reserve(train: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Up to `count` training images, and the other ones, which the classifier is trained on.

    A classifier knows its own training images, so that their features differ from those of new
    images: distances to them would be too large for every set but themselves.
    """
    count = min(count, max(2, len(train.row_numbers) // MAX_RESERVED))
    known = train.sample(count, seed)
    return known, train.without(known)


def train_classifier(part: ImageSet, what: str, settings: Settings) -> FeatureNetwork:
    """The classifier of a set of images, from the cache where an earlier call trained it.

    `what` names the images in errors. The global random state does not change.
    """
    device, seed = settings.device, settings.seed
    counts = Counter(row.label for row in part.rows)
    if "" in counts or len(counts) < 2:
        raise UserError(
            f"{what}: --features classifier needs a column label with a class for every image, two "
            "classes or more; add it, or use other features"
        )
    names = tuple(sorted(counts))
    rare = [f"{name} ({counts[name]})" for name in names if counts[name] < FEW_IMAGES]
    if rare:
        warn(
            f"classes with fewer than {FEW_IMAGES} training images, for which label_agreement says "
            f"little: {first_few(rare)}"
        )
    part = part.sample(TRAINING_IMAGES, seed)  # at most so many are used
    file = _cache_file(part, settings)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = Classifier(part.images.channels, len(names))
        try:
            model.load_state_dict(safetensors.torch.load_file(file))
        except (OSError, safetensors.SafetensorError, RuntimeError):  # not there, or damaged
            model.load_state_dict(fit_classifier(part, names, device, seed).state_dict())
            file.parent.mkdir(parents=True, exist_ok=True)
            staging = file.with_suffix(f".{os.getpid()}.tmp")  # other processes may write it, too
            safetensors.torch.save_file(model.state_dict(), staging)
            staging.replace(file)
    preprocessing = f"bilinear shrinking to at most {MAX_SIDE} pixels a side"
    return FeatureNetwork("classifier", model.eval().to(device), preprocessing, names)


def _cache_file(part: ImageSet, settings: Settings) -> Path:
    """Named after all that the result of a training depends on."""
    device, channels = settings.device, part.images.channels
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{settings.seed} {device.type} {torch.__version__} {channels}".encode())
    digest.update(str([row.label for row in part.rows]).encode())
    for pixels in part.images.batches(part.row_numbers.split(1024), device):
        digest.update(pixels.cpu().contiguous().numpy().tobytes())
    return CACHE / f"classifier-{digest.hexdigest()[:16]}.safetensors"


def fit_classifier(
    part: ImageSet, names: Sequence[str], device: torch.device, seed: int
) -> Classifier:
    """Train a classifier on a set of images; sets the global random state to `seed`."""
    torch.manual_seed(seed)
    images, rows = part
    model = Classifier(images.channels, len(names)).to(device)
    model = model.to(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.long)
    labels[rows] = class_targets(part.rows, names, "the data")
    optimizer = torch.optim.AdamW(model.parameters())
    batch = min(BATCH, len(rows))
    per_epoch = len(rows) // batch
    steps = min(math.ceil(TRAINING_IMAGES / batch), MAX_EPOCHS * per_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    order = [
        batch_rows
        for epoch in range(math.ceil(steps / per_epoch))
        for batch_rows in epoch_order(rows, seed, epoch).split(batch)[:per_epoch]
    ][:steps]
    loaded = zip(order, images.batches(order, device), strict=True)
    for batch_rows, pixels in tqdm(loaded, desc="classifier", total=steps, disable=None):
        F.cross_entropy(model(pixels)[1], labels[batch_rows].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()
