"""Features of sets of images, and the classifier that gives them where nothing is downloaded.

The classifier is trained on the labels of the data set itself in about a minute. A cache keeps it
under a key of the data, the seed and the content of this file.
"""

import hashlib
import itertools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.cli import UserError, first_few
from utils.data.sources import Row, ShardedArray, epoch_order
from utils.distributed import ALONE, Distributed
from utils.evaluation.metrics import SHARE, Estimate, estimate, resample
from utils.files import CACHE
from utils.progress import ProgressBar, warn

NETWORKS = ("classifier", "inception", "dinov2")
MAX_SIDE = 32  # pixels, of images that are classified, or compared pixel by pixel
TRAINING_IMAGES = 180_000  # of the classifier at most, with repetitions
CHECK_IMAGES, PATIENCE = 4096, 4  # images between checks; checks without gain
MAX_HELD_OUT = 5000  # images for these checks
BATCH, RATE = 128, 2e-3
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


class DecodedImages:
    """Grids of indices (N, h, w[, depth]) as a source of images, decoded by their tokenizer."""

    def __init__(self, grids: Tensor | ShardedArray, rows: Sequence[Row], tokenizer: Any) -> None:
        self.grids, self.rows, self._decode = grids, rows, tokenizer.decode
        self.channels, factor = tokenizer.config.in_channels, tokenizer.config.downsampling
        self.size = grids.shape[1] * factor, grids.shape[2] * factor

    def __len__(self) -> int:
        return len(self.grids)

    @torch.no_grad()
    def batches(self, batches_of_rows: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """(B, C, H, W) in [-1, 1] of each batch of row numbers, in 8 bits as if saved and read."""
        for rows in batches_of_rows:
            images = self._decode(self.grids[rows].long().to(device))
            yield images.add(1).mul(127.5).round().div(127.5).sub(1)


class Settings(NamedTuple):
    """Where and in which batches networks run."""

    device: torch.device
    batch_size: int
    seed: int  # of resamples and random choices
    group: Distributed = ALONE  # each process runs the networks on its part of the images


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

    def split(self, count: int, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Up to `count` random rows, and the others."""
        order = epoch_order(self.row_numbers, seed, 0)
        chosen, others = (part.sort().values for part in (order[:count], order[count:]))
        return ImageSet(self.images, chosen), ImageSet(self.images, others)

    def map(
        self,
        settings: Settings,
        what: str,
        function: Callable[[Tensor], dict[str, Tensor]],
        *augmentation: Any,
    ) -> dict[str, Tensor]:
        """What a function makes of all images, of each batch (B, C, H, W) in [-1, 1], in order.

        It returns tensors (B, ...) by name, which are joined on the CPU; `what` labels a progress
        bar. Each process of the group takes a part of the images.
        """
        rows = self.row_numbers[settings.group.block(len(self.row_numbers), settings.batch_size)]
        batches = rows.split(settings.batch_size), settings.device
        parts: dict[str, list[Tensor]] = defaultdict(list)
        with ProgressBar(total=len(rows), desc=what, unit=" images", leave=None) as bar:
            for images in self.images.batches(*batches, *augmentation):
                for name, values in function(images).items():
                    parts[name].append(values.cpu())
                bar.update(len(images))
        return {name: settings.group.join(torch.cat(part)) for name, part in parts.items()}

    def load(self, positions: Tensor, device: torch.device) -> Tensor:
        """The images at some positions of the rows, (n, C, H, W) in [-1, 1]."""
        return next(iter(self.images.batches([self.row_numbers[positions.cpu()]], device)))


class Features(NamedTuple):
    """A set of N images in a feature network."""

    features: Tensor  # (N, D), float32
    pixels: Tensor  # (N, C * h * w), uint8, of the `thumbnails`
    logits: Tensor | None = None  # (N, classes), or None where the network has no classes


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
    # Distances are computed in float64, which only CUDA and the CPU have.
    home = "cuda" if settings.device.type == "cuda" else "cpu"

    def columns(images: Tensor) -> dict[str, Tensor]:
        features, logits = network.network(images)
        found = {"features": features.float(), "pixels": thumbnails(images).flatten(1)}
        return found if logits is None else found | {"logits": logits}

    found = part.map(settings, what, columns)
    return Features(**{name: values.to(home) for name, values in found.items()})


def shrink(images: Tensor) -> Tensor:
    """(B, C, H, W) -> the same, or shrunk to `MAX_SIDE` pixels along the longer side."""
    scale = MAX_SIDE / max(images.shape[2:])
    if scale >= 1:
        return images
    size = [max(1, math.floor(length * scale)) for length in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def thumbnails(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], shrunk, in 8 bits: (B, C, h, w), uint8."""
    return shrink(images).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def class_targets(network: FeatureNetwork, rows: Sequence[Row], what: str) -> Tensor | None:
    """The number of each image's class, (N,); `UNKNOWN` for classes without training images.

    None where images have no labels, or the network no classes.
    """
    if not network.class_names or not all(row.label for row in rows):
        return None
    numbers = {name: number for number, name in enumerate(network.class_names)}
    targets = torch.tensor([numbers.get(row.label, UNKNOWN) for row in rows])
    unknown = first_few(sorted({row.label for row in rows} - numbers.keys()))
    left_out = int((targets == UNKNOWN).sum())
    if left_out == len(rows):
        classes = f"the classifier was not trained on the labels {unknown} of {what}"
        raise UserError(f"{classes}; give data of the same classes")
    if left_out:
        share = f"{left_out:,} of {len(rows):,} images of {what}"
        warn(f"label_agreement leaves out {share}, of classes without training images: {unknown}")
    return targets


def label_agreement(found: Features, targets: Tensor, weights: Tensor) -> Estimate:
    """The share of N images of known classes (N,) that a classifier assigns to their class."""
    right, known = found.logits.argmax(dim=1).cpu() == targets, targets != UNKNOWN
    sums = [weights.cpu().double() @ one.double() for one in (right, known)]
    return estimate(sums[0] / sums[1].clamp(min=1), SHARE)


def check_network(network: FeatureNetwork, real: Features, targets: Tensor | None) -> float:
    """Print how far metrics in a network can be trusted, by N real images that are new to it.

    Returns its `label_agreement`, NaN without targets.
    """
    count, dimensions = real.features.shape
    if count <= dimensions:
        warn(
            f"the Frechet distance of {count} images by the {dimensions:,} features of "
            f"{network.name} is mostly noise; compare more than {dimensions:,}"
        )
    if targets is None:
        return math.nan
    accuracy = label_agreement(real, targets, resample(count, 0, replicates=2)).value
    print(f"classifier: {accuracy:.1%} of the labels of {count:,} held-out images right")
    return accuracy


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
        features = self.body(shrink(images))
        return features, self.head(features.relu())


def reserve(train: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Up to `count` training images, and the other ones, which the classifier is trained on.

    A classifier knows its own training images, so that their features differ from those of new
    images: distances to them would be too large for every set but themselves.
    """
    return train.split(min(count, max(2, len(train.row_numbers) // MAX_RESERVED)), seed)


def train_classifier(part: ImageSet, what: str, settings: Settings) -> FeatureNetwork:
    """The classifier of a set of images, from the cache where an earlier call trained it.

    `what` names the images in errors. The global random state does not change.
    """
    counts, device = Counter(row.label for row in part.rows), settings.device
    if "" in counts or len(counts) < 2:
        raise UserError(
            f"{what}: --features classifier needs a class for every image, two classes or more; "
            "add a column label, or use other features"
        )
    names = tuple(sorted(counts))
    rare = [f"{name} ({counts[name]})" for name in names if counts[name] < FEW_IMAGES]
    if rare:
        few = f"classes with fewer than {FEW_IMAGES} training images"
        warn(f"{few}, for which label_agreement means little: {first_few(rare)}")
    part = part.split(TRAINING_IMAGES, settings.seed)[0]  # at most so many are used
    read = part.map(settings, "reading images", lambda images: {"pixels": thumbnails(images)})
    images = read["pixels"].to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        model = Classifier(images.shape[1], len(names)).to(device)
        network = FeatureNetwork("classifier", model, f"shrunk to {MAX_SIDE} pixels", names)
        labels = class_targets(network, part.rows, what)
        digest = hashlib.sha256(Path(__file__).read_bytes())
        digest.update(images.cpu().numpy().tobytes())
        made_with = settings.seed, device.type, torch.__version__
        digest.update(str((made_with, images.shape, labels.tolist())).encode())
        file = CACHE / f"classifier-{digest.hexdigest()[:16]}.safetensors"
        if file.is_file():
            model.load_state_dict(load_file(file))
        elif settings.group.is_main:
            fit_classifier(model, images, labels, settings.seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            staging = file.with_suffix(f".{os.getpid()}.tmp")  # of this process alone
            save_file(model.state_dict(), staging)
            staging.replace(file)
        settings.group.copy_from_main(model)
    model.eval()
    return network


def fit_classifier(model: Classifier, images: Tensor, labels: Tensor, seed: int) -> None:
    """Train on images (N, C, H, W), uint8, of classes (N,), while accuracy on new ones rises.

    A tenth of the images is held out to measure it. From the end of the rise on, the learning rate
    falls to 0, within half as many steps as were taken before.
    """
    order = epoch_order(torch.arange(len(images)), seed, 0)
    count = min(MAX_HELD_OUT, max(1, len(images) // 10))
    held_out, rows, labels = order[:count], order[count:], labels.to(images.device)
    trained = deepcopy(model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(trained.parameters(), RATE)

    def predict(chosen: Tensor) -> Tensor:
        return trained(images[chosen].float() / 127.5 - 1)[1]

    size = min(BATCH, len(rows))
    most, end = max(1, TRAINING_IMAGES * 2 // 3 // size), 0  # steps at a constant rate
    every = max(CHECK_IMAGES, len(rows) // PATIENCE) // BATCH  # steps; in all an epoch
    accuracies: list[float] = []
    epochs = (epoch_order(rows, seed, epoch).split(size) for epoch in itertools.count(1))
    batches = (batch for epoch in epochs for batch in epoch if len(batch) == size)
    bar = ProgressBar(batches, "classifier, at most", most * 3 // 2, unit=" steps")
    for step, batch in enumerate(bar, 1):
        if end:
            optimizer.param_groups[0]["lr"] = RATE * max(0.0, 3 - 2 * step / end)
        F.cross_entropy(predict(batch), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not end and step % every == 0:
            trained.eval()
            with torch.inference_mode():
                logits = torch.cat([predict(part) for part in held_out.split(BATCH)])
            trained.train()
            right = logits.argmax(dim=1) == labels[held_out]
            accuracies.append(float(right.double().mean()))
        best = accuracies.index(max(accuracies)) if accuracies else 0
        if not end and (best < len(accuracies) - PATIENCE or step == most):
            end = step
        if end and step >= 1.5 * end:
            break
    model.load_state_dict(trained.state_dict())
