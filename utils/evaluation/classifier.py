"""A small classifier, taught by a data set's own labels, for features where nothing is downloaded.

It takes about a minute, is kept, and is found again by the data, the seed and this very file.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.cli import UserError, first_few
from utils.data.table import Row, epoch_order
from utils.files import write_folder
from utils.provenance import Provenance
from utils.training import checkpoint

CACHE = Path("outputs/cache")
SEEN, MAX_EPOCHS = 180_000, 30  # training images in all, but no more than 30 times each
BATCH, PEAK_RATE = 128, 4e-3
MAX_SIDE = 64  # pixels; larger images are shrunk


class Images(Protocol):
    """What is looked at: an `ImageDataset`, or another source of images with these members."""

    rows: Sequence[Row]
    channels: int
    size: tuple[int, int]

    def __len__(self) -> int: ...

    def batches(
        self, batches_of_rows: Sequence[Tensor], device: torch.device
    ) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class ClassifierConfig:
    """channels of the images; names of the classes in the order of the logits."""

    channels: int
    class_names: tuple[str, ...]


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> features (B, 128) and logits (B, classes).

    Over the images that taught it each feature has about mean 0 and variance 1.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Sequential(
            *(nn.Conv2d(config.channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(2048, 128)),
            nn.BatchNorm1d(128, affine=False),  # one scale, for distances and kernels
        )
        self.head = nn.Linear(128, len(config.class_names))

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
            f"{what}: {missing} of {len(rows)} images have no label; a column label is needed for "
            "--features classifier"
        )
    names = tuple(sorted({row.label for row in rows}))
    if len(names) < 2:
        raise UserError(
            f"{what}: all images have the label {names[0]!r}; --features classifier needs two "
            "classes or more"
        )
    return names


def targets(rows: Sequence[Row], names: tuple[str, ...], what: str) -> Tensor:
    """The number of each image's class, (N,).

    Raises:
        UserError: a label that is not among `names`.
    """
    unknown = sorted({row.label for row in rows} - set(names))
    if unknown:
        raise UserError(
            f"the labels {first_few(unknown)} of {what} are none that the classifier was taught; "
            "give data of the same classes"
        )
    number = {name: place for place, name in enumerate(names)}
    return torch.tensor([number[row.label] for row in rows])


def train(
    images: Images, rows: Tensor, names: tuple[str, ...], device: torch.device, seed: int
) -> Classifier:
    """Teach a classifier the given rows, from the global random numbers that `seed` begins."""
    torch.manual_seed(seed)
    model = Classifier(ClassifierConfig(images.channels, names)).to(device)
    model = model.to(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.long)
    labels[rows] = targets([images.rows[row] for row in rows.tolist()], names, "the training data")
    optimizer = torch.optim.AdamW(model.parameters())
    batch = min(BATCH, len(rows))
    per_epoch = len(rows) // batch
    steps = min(math.ceil(SEEN / batch), MAX_EPOCHS * per_epoch)
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


def _key(images: Images, rows: Tensor, seed: int, device: torch.device) -> str:
    """What the result of a training depends on, in 16 hexadecimal digits."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{seed} {device.type} {torch.__version__} {images.channels}".encode())
    digest.update(str([images.rows[row].label for row in rows.tolist()]).encode())
    for pixels in images.batches(rows.split(1024), device):
        digest.update(pixels.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def taught(images: Images, rows: Tensor, what: str, device: torch.device, seed: int) -> Classifier:
    """The classifier of these rows: that of an earlier call, or a new one.

    The global random numbers stay as they are.

    Raises:
        UserError: images without a label, or a damaged cache.
    """
    names = class_names([images.rows[row] for row in rows.tolist()], what)
    rows = epoch_order(rows, seed, 0)[:SEEN].sort().values  # no more are ever looked at
    folder = CACHE / f"classifier-{_key(images, rows, seed, device)}"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if not folder.exists():
            model = train(images, rows, names, device, seed)
            write_folder(folder, checkpoint.model_files(model, Provenance()))
        return checkpoint.load_model(folder, Classifier, device).model
