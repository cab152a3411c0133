"""Generated grids of indices as images, and how close they are to real ones during a training."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.sources import Row
from utils.distributed import Distributed
from utils.evaluation.distances import Features, frechet_distance, label_agreement
from utils.evaluation.features import (
    class_targets,
    extract_features,
    print_accuracy,
    train_classifier,
    warn_if_few,
)
from utils.evaluation.metrics import WIDTH, resample
from utils.provenance import LoadedModel

BATCH = 256
REPLICATES = 10  # enough for the standard error beside a curve
METRICS = ("fd_classifier", "fd_classifier_error", "label_agreement")


class DecodedImages:
    """Grids of indices (N, h, w[, depth]) as a source of images, decoded by their tokenizer."""

    def __init__(
        self,
        grids: Tensor,
        rows: Sequence[Row],
        decode: Callable[[Tensor], Tensor],
        channels: int,
        size: tuple[int, int],
    ) -> None:
        self.grids, self.rows, self.channels, self.size = grids, rows, channels, size
        self._decode = decode

    def __len__(self) -> int:
        return len(self.grids)

    @torch.no_grad()
    def batches(self, batches_of_rows: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images of each batch of row numbers, (B, C, H, W) in [-1, 1].

        Their values are those of 8-bit images, as if they had been saved and read.
        """
        for rows in batches_of_rows:
            images = self._decode(self.grids[rows].long().to(device))
            yield images.add(1).mul(127.5).round().div(127.5).sub(1)


class SampleEvaluator:
    """Compares sampled grids with held-out grids, both decoded by one tokenizer.

    What the tokenizer loses is lost on both sides, so that the metrics measure the GPT alone.
    One sample is compared for the label of each of the held-out `rows`.
    """

    def __init__(
        self,
        tokenizer: LoadedModel | None,
        grids: Tensor,
        rows: Sequence[Row],
        train: Tensor,
        held_out: Tensor,
        *,
        seed: int,
        group: Distributed,
    ) -> None:
        """Train a classifier on the decoded training grids, or load it from the cache.

        `train` and `held_out` are row numbers of the grids (N, h, w). Only the main process of
        the group works.

        Raises:
            UserError: no tokenizer, images without a label, or fewer than 2 to compare.
        """
        self.rows, self._group = held_out, group
        if tokenizer is None:
            raise UserError("--fd_samples needs the tokenizer of the indices; add --model_dir")
        if len(held_out) < 2:
            raise UserError(
                f"--fd_samples leaves {len(held_out)} validation images to compare with; use 2 or "
                "more, or 0 for none"
            )
        if not group.is_main:
            return
        self._decode, self._config = tokenizer.model.decode, tokenizer.model.config
        images = self._images(grids, rows)
        self._network = train_classifier(images, train, "--fd_samples", group.device, seed)
        self._real = self._features(images, held_out)
        names = self._network.class_names
        of_rows = [rows[row] for row in held_out.tolist()]
        self._targets = class_targets(of_rows, names, "--path_to_data")
        weights = (resample(len(held_out), seed + n, REPLICATES) for n in (0, 1))
        self._weights = next(weights), next(weights)
        warn_if_few(self._real, self._network.name)
        accuracy = label_agreement(self._real, self._targets, self._weights[0])
        print_accuracy(accuracy, len(held_out))

    def _images(self, grids: Tensor, rows: Sequence[Row]) -> DecodedImages:
        config = self._config
        return DecodedImages(grids, rows, self._decode, config.in_channels, config.image_size)

    def _features(self, images: DecodedImages, rows: Tensor) -> Features:
        return extract_features(self._network, images, rows, self._group.device, BATCH, "features")

    def metrics(self, sample: Callable[[], Tensor]) -> dict[str, float]:
        """FD (classifier), its standard error, and the share of samples of the right class.

        `sample` gives a grid for each of `rows`, (n, h, w); only the main process calls it.
        """
        values = torch.zeros(len(METRICS), device=self._group.device)
        if self._group.is_main:
            grids = sample()
            found = self._features(self._images(grids, ()), torch.arange(len(grids)))
            distance = frechet_distance(self._real.features, found.features, self._weights)
            right = label_agreement(found, self._targets, self._weights[1])
            values += values.new_tensor([distance.value, distance.standard_error, right.value])
            self._group.print(
                f"{len(grids):,} samples: FD (classifier) {distance.value:.3f} +- "
                f"{WIDTH * distance.standard_error:.3f}, {right.value:.1%} of the right class"
            )
        return dict(zip(METRICS, self._group.all_reduce_sum(values).tolist(), strict=True))
