"""An indices folder as training data: batches of grids, and what a GPT is given before each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.conditions import read_conditions
from utils.data.crops import read_crops
from utils.data.indices import Indices, read_indices
from utils.data.table import split_rows
from utils.data.vocabulary import Vocabulary
from utils.provenance import LoadedModel


@dataclass(frozen=True)
class IndicesConfig:
    """What to train on."""

    path_to_data: str = field(
        metadata={"help": "indices folder of quantize_dataset.py, runs:/..., or a text file"}
    )
    model_dir: str = field(
        default="", metadata={"help": "tokenizer that decodes the samples drawn in training"}
    )
    val_fraction: float = field(
        default=0.1, metadata={"help": "share of a text file's lines for validation"}
    )
    fd_samples: int = field(
        default=0,
        metadata={"help": "samples that an evaluation draws for FD (classifier); 0: none"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.fd_samples < 0:
            raise ValueError(f"fd_samples must not be negative, got {self.fd_samples}")


class IndexDataset:
    """The grids of an indices folder or a text file.

    Attributes:
        path: of the folder or the file.
        words: what the indices mean.
        rows: what the manifest says of each grid.
        grids: (N, h, w), or (N, h, w, depth) for a depth above 1, of any integer type.
        classes: (N,), the prefix token of each grid's label.
        conditions: (N, hc, wc), of any integer type, or None.
        train_rows, val_rows: row numbers.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: LoadedModel | None,
        *,
        latent_dim: tuple[int, int] | None,
        val_fraction: float,
        seed: int,
    ) -> None:
        """Read all indices, and split them as their manifest says, or else by `seed`.

        Args:
            path: the folder or the file.
            tokenizer: what made the indices, where it is at hand.
            latent_dim, val_fraction: of a text file, which does not say.
            seed: of the split, and of the choice among crops.

        Raises:
            UserError: no indices, damaged ones, or those of another tokenizer.
        """
        self.path, self._seed = path, seed
        indices = read_indices(path, latent_dim=latent_dim, depth=None)
        if tokenizer is not None:
            _check_tokenizer(tokenizer, indices, path)
        self.words = describe(indices, tokenizer)
        self.rows, self.grids = indices.rows, indices.tensor()
        self.classes = torch.tensor(self.words.tokens([row.label for row in indices.rows]))
        self.conditions = read_conditions(path, indices)
        self._crops = read_crops(path, indices)
        self.train_rows, self.val_rows = split_rows(
            indices.rows, val_fraction=val_fraction, seed=seed
        )

    def __str__(self) -> str:
        more = "" if self.conditions is None else f"conditions of {_by(self.conditions[0].shape)}, "
        return (
            f"{self.path}: {len(self.grids):,} grids of {_by(self.grids[0].shape)}, "
            f"{self.words.codebook_size} codes, {len(self.words.class_names)} classes, {more}"
            f"{len(self.train_rows):,} to train on, {len(self.val_rows):,} to validate"
        )

    def name(self, row: int) -> str:
        """What to call a row of the data set in a message."""
        return f"row {row + 1} {self.rows[row].image_path}".rstrip()

    @property
    def arrays(self) -> list[np.ndarray]:
        """All that a training reads: grids, conditions and crops, as far as there are any."""
        crops = None if self._crops is None else self._crops.array
        return [np.asarray(x) for x in (self.grids, self.conditions, crops) if x is not None]

    @property
    def params(self) -> dict[str, object]:
        """What a list of runs shows of the data."""
        return {
            "data": self.path.name,
            "latent_dim": self.words.latent_dim,
            "codebook_size": self.words.codebook_size,
            "classes": len(self.words.class_names),
        }

    def prefix_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Classes (B,) and conditions (B, hc, wc), or None, of these rows."""
        return self.classes[rows], None if self.conditions is None else self.conditions[rows]

    def batches(
        self, batches_of_rows: Sequence[Tensor], epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """`prefix_inputs`, and grids (B, h, w[, depth]), int64, of each batch of row numbers.

        Args:
            batches_of_rows: row numbers.
            epoch: which crops of the images are taken where there are any; None: the images.
        """
        for rows in batches_of_rows:
            whole = epoch is None or self._crops is None
            grids = self.grids[rows] if whole else self._crops.pick(rows, self._seed, epoch)
            yield *self.prefix_inputs(rows), grids.long()


def describe(indices: Indices, tokenizer: LoadedModel | None) -> Vocabulary:
    """The vocabulary of a data set of indices: its codes, and its labels in order."""
    names = tuple(sorted({row.label for row in indices.rows} - {""}))
    if indices.meta is not None:
        meta = indices.meta
        size, sha256, run_id = meta.codebook_size, meta.tokenizer_sha256, meta.tokenizer_run_id
    elif tokenizer is not None:
        size, sha256 = tokenizer.model.config.codebook_size, tokenizer.sha256
        run_id = tokenizer.provenance.run_id
    else:  # a plain text file: as many codes as it needs
        size, sha256, run_id = max(2, indices.largest() + 1), "", ""
    condition = indices.meta.condition if indices.meta is not None else None
    return Vocabulary(size, indices.latent_dim, names, sha256, run_id, indices.depth, condition)


def _check_tokenizer(tokenizer: LoadedModel, indices: Indices, path: Path) -> None:
    """Refuse a tokenizer that is not that of the indices."""
    if indices.meta is not None:
        indices.meta.check_tokenizer(tokenizer, path)
    makes = (*tokenizer.model.config.latent_dim, tokenizer.model.config.depth)
    if makes != (*indices.latent_dim, indices.depth):
        raise UserError(
            f"{path} has grids of {(*indices.latent_dim, indices.depth)}, but the tokenizer "
            f"{tokenizer.folder} makes {makes}; use indices and models of one tokenizer"
        )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
