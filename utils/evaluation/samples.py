"""How close the samples of a GPT are to real images, measured during its training."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.sources import Row
from utils.distributed import Distributed
from utils.evaluation.features import (
    DecodedImages,
    ImageSet,
    Settings,
    class_targets,
    extract_features,
    label_agreement,
    print_accuracy,
    reserve,
    train_classifier,
    warn_if_few,
)
from utils.evaluation.metrics import WIDTH, frechet_distance, resample
from utils.provenance import LoadedModel

BATCH = 256
REPLICATES = 10  # enough for the standard error beside a curve
METRICS = ("fd_classifier", "fd_classifier_error", "label_agreement", "real_fd_classifier")


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
        """Train a classifier on decoded training grids, apart from some to compare samples with.

        `train` and `held_out` are row numbers of the grids (N, h, w). Only the main process of
        the group works.
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
        config = tokenizer.model.config
        self._decoded = tokenizer.model.decode, config.in_channels, config.image_size
        self._settings = Settings(group.device, BATCH, seed)
        images = DecodedImages(grids, rows, *self._decoded)
        known, training = reserve(ImageSet(images, train), len(held_out), seed)
        self._network = train_classifier(training, "--fd_samples", self._settings)
        real = ImageSet(images, held_out)
        self._real = extract_features(self._network, real, self._settings, "features")
        self._targets = class_targets(real.rows, self._network.class_names, "--path_to_data")
        first, second = (resample(len(held_out), seed + n, REPLICATES) for n in (0, 1))
        self._weights = first, second
        best = extract_features(self._network, known, self._settings, "features").features
        pair = first, resample(len(best), seed + 1, REPLICATES)
        self._best = frechet_distance(self._real.features, best, pair).value
        warn_if_few(self._real, self._network.name)
        print_accuracy(label_agreement(self._real, self._targets, first), len(held_out))

    def metrics(self, sample: Callable[[], Tensor]) -> dict[str, float]:
        """FD (classifier), its standard error, and the share of samples of the right class.

        `sample` gives a grid for each of `rows`, (n, h, w); only the main process calls it.
        """
        values = torch.zeros(len(METRICS), device=self._group.device)
        if self._group.is_main:
            images = ImageSet.whole(DecodedImages(sample(), (), *self._decoded))
            found = extract_features(self._network, images, self._settings, "features")
            distance = frechet_distance(self._real.features, found.features, self._weights)
            right = label_agreement(found, self._targets, self._weights[1])
            error, best = distance.standard_error, self._best
            values += values.new_tensor([distance.value, error, right.value, best])
            self._group.print(
                f"{len(self.rows):,} samples: FD (classifier) {distance.value:.3f} +- "
                f"{WIDTH * error:.3f} (training images: {best:.3f}), "
                f"{right.value:.1%} of the right class"
            )
        values = self._group.all_reduce_sum(values)
        return dict(zip(METRICS, values.tolist(), strict=True))
