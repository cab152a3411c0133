"""Features of sets of images, and the classifier that gives them where nothing is downloaded.

The classifier is trained on the labels of the data set itself in about a minute. A cache keeps
it under a key of the data, the seed and the content of this file.
"""

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.cli import UserError, first_few
from utils.data.sources import Row, epoch_order
from utils.evaluation.distances import Features
from utils.evaluation.metrics import Estimate

NETWORKS = ("classifier", "inception", "dinov2")
PIXEL_SIDE = 32  # at most, where pixels are compared
CACHE = Path("outputs/cache")
TRAINING_IMAGES, MAX_EPOCHS = 180_000, 30  # of the classifier, but each at most 30 times
BATCH, PEAK_RATE = 128, 4e-3
MAX_SIDE = 64  # pixels; the classifier shrinks larger images


class Images(Protocol):
    """An `ImageDataset`, or another source of images with these members."""

    channels: int
    size: tuple[int, int]

    @property
    def rows(self) -> Sequence[Row]: ...

    def __len__(self) -> int: ...

    def batches(
        self, batches_of_rows: Sequence[Tensor], device: torch.device
    ) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class FeatureNetwork:
    """Images (B, C, H, W) in [-1, 1] -> features (B, D) and logits (B, classes) or None."""

    name: str  # of `NETWORKS`
    network: nn.Module
    preprocessing: str  # of an image before the network, in words
    class_names: tuple[str, ...] = ()  # of the classifier, in the order of its logits

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return weights_sha256(self.network)


def weights_sha256(network: nn.Module) -> str:
    """The SHA-256 of all weights of a network, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def extract_features(
    network: FeatureNetwork,
    images: Images,
    rows: Tensor,
    device: torch.device,
    batch_size: int,
    what: str,
) -> Features:
    """The features of the given rows of a source of images; `what` labels the progress bar."""
    # Distances are computed in float64, which only CUDA and the CPU have.
    home = device if device.type == "cuda" else torch.device("cpu")
    parts = []
    with tqdm(total=len(rows), desc=what, unit=" images", disable=None) as bar:
        for batch in images.batches(rows.split(batch_size), device):
            features, logits = network.network(batch)
            logits = None if logits is None else logits.float().to(home)
            parts.append((features.float().to(home), logits, _shrink(batch, PIXEL_SIDE).to(home)))
            bar.update(len(batch))
    features, logits, pixels = zip(*parts, strict=True)
    logits = None if logits[0] is None else torch.cat(logits)
    return Features(torch.cat(features), logits, torch.cat(pixels))


def _shrink(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, C * h * w), uint8, of at most `side` pixels a side."""
    scale = side / max(images.shape[2:])
    if scale < 1:
        size = [max(1, math.floor(length * scale)) for length in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).flatten(1)


def warn_if_few(features: Features, name: str) -> None:
    """Warn where a set is too small for a meaningful Frechet distance in the network `name`."""
    count, dimensions = features.features.shape
    if count <= dimensions:
        print(
            f"warning: the Frechet distance of {count} images by the {dimensions:,} features "
            f"of {name} is mostly noise; compare more than {dimensions:,}",
            file=sys.stderr,
        )


def print_accuracy(accuracy: Estimate, count: int) -> None:
    """Print the `label_agreement` of the classifier on held-out real images."""
    percent = 100 * accuracy.value
    print(f"classifier: {percent:.1f} % of the labels of {count:,} held-out images right")


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
        scale = MAX_SIDE / max(images.shape[2:])
        if scale < 1:
            images = F.interpolate(
                images, scale_factor=scale, mode="bilinear", antialias=True, align_corners=False
            )
        features = self.body(images)
        return features, self.head(features.relu())


def class_names(rows: Sequence[Row], what: str) -> tuple[str, ...]:
    """The classes of labelled images, sorted.

    Raises:
        UserError: images without a label, or all of one class.
    """
    missing = sum(not row.label for row in rows)
    if missing:
        raise UserError(
            f"{what}: {missing} of {len(rows)} images have no label; --features classifier needs a "
            "column label"
        )
    names = tuple(sorted({row.label for row in rows}))
    if len(names) < 2:
        raise UserError(
            f"{what}: all images have the label {names[0]!r}; --features classifier needs two "
            "classes or more"
        )
    return names


def class_targets(rows: Sequence[Row], names: Sequence[str], what: str) -> Tensor:
    """The number of each image's class, (N,).

    Raises:
        UserError: a label that is not among `names`.
    """
    unknown = sorted({row.label for row in rows} - set(names))
    if unknown:
        raise UserError(
            f"the classifier was not trained on the labels {first_few(unknown)} of {what}; give "
            "data of the same classes"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[row.label] for row in rows])


def fit_classifier(
    images: Images, rows: Tensor, names: Sequence[str], device: torch.device, seed: int
) -> Classifier:
    """Train a classifier on the given rows; sets the global random state to `seed`."""
    torch.manual_seed(seed)
    model = Classifier(images.channels, len(names)).to(device)
    model = model.to(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.long)
    of_rows = [images.rows[row] for row in rows.tolist()]
    labels[rows] = class_targets(of_rows, names, "the training data")
    optimizer = torch.optim.AdamW(model.parameters())
    batch = min(BATCH, len(rows))
    per_epoch = len(rows) // batch
    steps = min(math.ceil(TRAINING_IMAGES / batch), MAX_EPOCHS * per_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    order = [
        part
        for epoch in range(math.ceil(steps / per_epoch))
        for part in epoch_order(rows, seed, epoch).split(batch)[:per_epoch]
    ][:steps]
    loaded = zip(order, images.batches(order, device), strict=True)
    for part, pixels in tqdm(loaded, desc="classifier", total=steps, disable=None):
        F.cross_entropy(model(pixels)[1], labels[part].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _cache_file(images: Images, rows: Tensor, seed: int, device: torch.device) -> Path:
    """Named after all that the result of a training depends on."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{seed} {device.type} {torch.__version__} {images.channels}".encode())
    digest.update(str([images.rows[row].label for row in rows.tolist()]).encode())
    for pixels in images.batches(rows.split(1024), device):
        digest.update(pixels.cpu().contiguous().numpy().tobytes())
    return CACHE / f"classifier-{digest.hexdigest()[:16]}.safetensors"


def train_classifier(
    images: Images, rows: Tensor, what: str, device: torch.device, seed: int
) -> FeatureNetwork:
    """The classifier of the given rows, from the cache where an earlier call trained it.

    `what` names the images in errors. The global random state does not change.

    Raises:
        UserError: images without a label, or of one class.
    """
    names = class_names([images.rows[row] for row in rows.tolist()], what)
    rows = epoch_order(rows, seed, 0)[:TRAINING_IMAGES].sort().values  # at most so many are used
    file = _cache_file(images, rows, seed, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = Classifier(images.channels, len(names))
        if not _load_cached(model, file):
            trained = fit_classifier(images, rows, names, device, seed)
            model.load_state_dict(trained.state_dict())  # in the memory layout of a cached one
            file.parent.mkdir(parents=True, exist_ok=True)
            staging = file.with_suffix(f".{os.getpid()}.tmp")  # other processes may write it, too
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            safetensors.torch.save_file(state, staging, {"sha256": weights_sha256(model)})
            staging.replace(file)
    preprocessing = f"bilinear shrinking to at most {MAX_SIDE} pixels a side"
    return FeatureNetwork("classifier", model.eval().to(device), preprocessing, names)


def _load_cached(model: Classifier, file: Path) -> bool:
    """Whether the cache holds undamaged weights, which are loaded."""
    with contextlib.suppress(OSError, safetensors.SafetensorError, RuntimeError):
        with safetensors.safe_open(file, framework="pt") as opened:
            sha256 = (opened.metadata() or {}).get("sha256")
        model.load_state_dict(safetensors.torch.load_file(file))
        return weights_sha256(model) == sha256
    return False
