"""How close the samples of a GPT are to real images, measured during its training."""

from functools import partial

from torch import Tensor

from utils.cli import UserError
from utils.data.index_dataset import IndexDataset
from utils.distributed import Distributed
from utils.evaluation import features
from utils.evaluation.features import DecodedImages, Features, ImageSet, Settings
from utils.evaluation.metrics import WIDTH, Estimate, frechet_distance, resample
from utils.provenance import LoadedModel

BATCH = 256
REPLICATES = 10  # enough for the standard error beside a curve


class SampleEvaluator:
    """Compares sampled grids with held-out grids, both decoded by one tokenizer.

    What the tokenizer loses is lost on both sides, so that the metrics measure the GPT alone.
    One sample is compared for the label of each of the held-out `rows`.
    """

    def __init__(
        self,
        data: IndexDataset,
        tokenizer: LoadedModel | None,
        count: int,
        seed: int,
        group: Distributed,
    ) -> None:
        """Train a classifier on decoded training grids, apart from some to compare samples with.

        At most `count` validation grids are compared. Only the main process of the group works.
        """
        self.rows, self._group = data.val_rows[:count], group
        if tokenizer is None:
            raise UserError("--fd_samples needs the tokenizer of the indices; add --model_dir")
        if len(self.rows) < 2:
            left = f"--fd_samples leaves {len(self.rows)} validation images to compare with"
            raise UserError(f"{left}; use 2 or more, or 0 for none")
        if not group.is_main:
            return
        settings = Settings(group.device, BATCH, seed)
        images = DecodedImages(data.grids, data.rows, tokenizer.model)
        known, others = features.reserve(ImageSet(images, data.train_rows), len(self.rows), seed)
        network = features.train_classifier(others, "--fd_samples", settings)
        extract, real = features.extract_features, ImageSet(images, self.rows)
        self._tokenizer, self._seed = tokenizer.model, seed
        self._extract = partial(extract, network, settings=settings, what="features")
        self._real = self._extract(real)
        self._targets = features.class_targets(network, real.rows, "--path_to_data")
        self._best = self._distance(self._extract(known)).value
        self._accuracy = features.check_network(network, self._real, self._targets)

    def _distance(self, found: Features) -> Estimate:
        sets = self._real.features, found.features
        first, second = (resample(len(x), self._seed + n, REPLICATES) for n, x in enumerate(sets))
        return frechet_distance(*sets, (first, second))

    def metrics(self, grids: Tensor) -> dict[str, float]:
        """FD (classifier), its standard error, and the share of samples of the right class.

        `grids` (n, h, w) are sampled, one for each of `rows`; only the main process calls this.
        """
        found = self._extract(ImageSet.whole(DecodedImages(grids, (), self._tokenizer)))
        distance, weights = self._distance(found), resample(len(grids), 0, REPLICATES)
        right = features.label_agreement(found, self._targets, weights).value
        self._group.print(
            f"{len(self.rows):,} samples: FD (classifier) {distance.value:.3f} +- "
            f"{WIDTH * distance.standard_error:.3f} (training images: {self._best:.3f}), "
            f"{right:.1%} of the right class (real images: {self._accuracy:.1%})"
        )
        return {
            "fd_classifier": distance.value,
            "fd_classifier_error": distance.standard_error,
            "label_agreement": right,
            "real_fd_classifier": self._best,
        }
