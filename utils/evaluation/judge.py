"""How far samples are from real images while a training goes on: a classifier looks at both."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.table import Row
from utils.distributed import Distributed
from utils.evaluation.bootstrap import WIDTH, resample
from utils.evaluation.classifier import targets
from utils.evaluation.decoded import DecodedImages
from utils.evaluation.distances import frechet_distance
from utils.evaluation.features import Seen, look, taught_network
from utils.evaluation.sample_quality import agreement, say_accuracy
from utils.provenance import LoadedModel

BATCH = 256
REPLICATES = 10  # enough for an error beside a curve
KEYS = ("fd_classifier", "fd_classifier_error", "label_agreement")


class Judge:
    """Compares drawn grids with held-out grids, both decoded by one tokenizer.

    What the tokenizer loses is lost on both sides, so that the figures are the GPT's alone.

    Attributes:
        rows: the held-out rows that are looked at; a sample is drawn for the label of each.
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
        """Teach a classifier the decoded training grids, or find it in the cache.

        Args:
            tokenizer: of the grids.
            grids: (N, h, w), the data set of indices.
            rows: what each of them is.
            train: rows that teach the classifier.
            held_out: rows to compare with.
            seed: of the classifier.
            group: of which the first process works.

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
        self._network = taught_network(images, train, "--fd_samples", group.device, seed)
        self._real = self._look(images, held_out)
        names = self._network.class_names
        self._targets = targets([rows[row] for row in held_out.tolist()], names, "--path_to_data")
        self._weights = tuple(resample(len(held_out), seed + n, REPLICATES) for n in (0, 1))
        self._network.warn_of_few(self._real)
        say_accuracy(agreement(self._real, self._targets, self._weights[0]), len(held_out))

    def _images(self, grids: Tensor, rows: Sequence[Row]) -> DecodedImages:
        config = self._config
        return DecodedImages(grids, rows, self._decode, config.in_channels, config.image_size)

    def _look(self, images: DecodedImages, rows: Tensor) -> Seen:
        return look(self._network, images, rows, self._group.device, BATCH, "looking")

    def figures(self, draw: Callable[[], Tensor]) -> dict[str, float]:
        """FD (classifier), its standard error, and the share of samples of the right class.

        Args:
            draw: gives a grid for each of `rows`, (n, h, w); called by the first process only.
        """
        values = torch.zeros(len(KEYS), device=self._group.device)
        if self._group.is_main:
            grids = draw()
            seen = self._look(self._images(grids, ()), torch.arange(len(grids)))
            distance = frechet_distance(self._real.features, seen.features, self._weights)
            right = agreement(seen, self._targets, self._weights[1])
            values += values.new_tensor([distance.value, distance.standard_error, right.value])
            self._group.print(
                f"{len(grids):,} samples: FD (classifier) {distance.value:.3f} +- "
                f"{WIDTH * distance.standard_error:.3f}, {right.value:.1%} of the right class"
            )
        return dict(zip(KEYS, self._group.all_reduce_sum(values).tolist(), strict=True))
