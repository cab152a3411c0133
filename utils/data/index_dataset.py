"""Indices as training data: grids, with condition, embeddings, caption or crops of each image."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import addresses
from utils.cli import Checked, UserError, flag
from utils.data import sources
from utils.data.indices import Indices, open_array, open_grids, read_indices, shards_of
from utils.data.sources import Row, Rows, ShardedArray, column_of, seeded_generator, split_rows
from utils.data.vocabulary import GridMeta, TextMeta, Vocabulary
from utils.provenance import LoadedModel

PREVIEW = 64  # validation rows whose conditions and classes are shown
CONDITION, CROPS = "condition", "crops"  # .npy, or shards as those of the indices
VECTORS = "float16", "float32", "float64"


@dataclass(frozen=True)
class IndicesConfig(Checked):
    """The data of a training on indices."""

    path_to_data: str = flag("", "indices folder, runs:/..., or a text file of indices")
    embeddings: str = flag("", "vectors to condition on: .npy (N, L, D) or Parquet, N as images")
    model_dir: str = flag("", "tokenizer that decodes the samples generated in training")
    val_fraction: float = flag(0.1, "share of a text file's lines for validation", above=0, below=1)
    ignore_labels: bool = flag(False, "train without classes, whatever labels the data have")
    fd_samples: int = flag(0, "samples for the FD (classifier) of an evaluation; 0: none", min=0)


class IndexDataset:
    """The grids of an indices folder or a text file.

    Attributes:
        path: of the folder or the file.
        vocabulary: the meaning of the indices.
        rows: one for each grid.
        grids: (N, h, w[, depth]) of any integer type, memory-mapped.
        classes: (N,), the prefix token of each grid's label.
        conditions: (N, hc, wc) of any integer type, memory-mapped, or None.
        embeddings: (N, L, D) of any floating-point type, memory-mapped, or None.
        captions: (N, L), their text tokens, or None.
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
        ignore_labels: bool = False,
        embeddings: str = "",
        caption_length: int | None = None,
    ) -> None:
        """Read all indices, and split them by their manifest, or else by `seed`.

        `latent_dim` and `val_fraction` are of a text file; `seed` is also of the choice of crops.
        A UserError if there are no indices, damaged ones, or those of another `tokenizer`.
        """
        self.path, self._seed = path, seed
        config = tokenizer.model.config if tokenizer is not None else None
        # A text file does not state what it belongs to.
        size = config.codebook_size if config is not None and path.is_file() else None
        indices = read_indices(path, latent_dim=latent_dim, codebook_size=size, depth=None)
        if ignore_labels:
            columns = {x: column_of(indices.rows, x) for x in Row._fields if x != "label"}
            indices = indices._replace(rows=Rows(columns))
        self.vocabulary = _vocabulary_of(indices)
        if tokenizer is not None:
            self.vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, config, path)
            if path.is_file():
                known = replace(self.vocabulary, tokenizer_sha256=tokenizer.sha256)
                self.vocabulary = replace(known, tokenizer_run_id=tokenizer.provenance.run_id)
        self.rows, self.grids = indices.rows, indices.grids
        self.classes = torch.tensor(self.vocabulary.tokens(column_of(self.rows, "label")))
        self.conditions, self.embeddings = read_conditions(path, indices), None
        if embeddings:
            shape = len(self.rows), "L", "D"
            self.embeddings = open_array(addresses.fetch(embeddings), shape, VECTORS)
            check_finite(self.embeddings, embeddings)
            self.vocabulary = replace(self.vocabulary, embeddings=self.embeddings.shape[1:])
        self.read_captions(caption_length)
        self._crops = read_crops(path, indices)
        self.train_rows, val_rows = split_rows(self.rows, val_fraction=val_fraction, seed=seed)
        self.val_rows = sources.preview_first(self.rows, val_rows, PREVIEW)

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("conditions", "embeddings", "captions")}
        more = "".join(f"{name} {_by(x[0].shape)}, " for name, x in parts.items() if x is not None)
        return (
            f"{self.path}: {len(self.grids):,} grids of {_by(self.grids[0].shape)}, "
            f"{self.vocabulary.codebook_size} codes, {len(self.vocabulary.class_names)} classes, "
            f"{more}{len(self.train_rows):,} to train on, {len(self.val_rows):,} to validate"
        )

    def name(self, row: int) -> str:
        """The name of a row in messages."""
        return f"row {row + 1} {self.rows[row].image_path}".rstrip()

    def read_captions(self, length: int | None, known: TextMeta | None = None) -> None:
        """Turn the captions, if there are any and `length` is not 0, into so many text tokens.

        They are those of `known`, or else of a tokenizer that is trained on the captions.
        """
        texts, self.captions, meta = column_of(self.rows, "caption"), None, None
        if length != 0 and any(texts):
            from utils.data import captions  # only where there are some

            meta = known and replace(known, length=length or known.length)
            meta = meta or captions.train_tokenizer(texts, length)
            self.captions = captions.encode(texts, meta)
        self.vocabulary = replace(self.vocabulary, captions=meta)

    @property
    def arrays(self) -> Iterator[np.ndarray]:
        """All indices that a training reads, and some of the embeddings."""
        some = None if self.embeddings is None else self.embeddings[:: len(self.rows) // 1000 + 1]
        for x in (self.grids, self.conditions, self._crops, self.captions, some):
            if isinstance(x, ShardedArray):
                yield from x.parts()
            elif x is not None:
                yield np.asarray(x)

    def prefix_inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Classes (B,) and, where there are any, the other `make_prefix` arguments, in order."""
        parts = self.classes, self.conditions, self.embeddings, self.captions
        return tuple(torch.as_tensor(part[rows.numpy()]) for part in parts if part is not None)

    def batches(
        self, batches_of_rows: Sequence[Tensor], epoch: int | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """`prefix_inputs`, and grids (B, h, w[, depth]), int64, of each batch of row numbers.

        Where there are crops, `epoch` chooses among them; None: the whole images.
        """
        crops = None if epoch is None else self._crops
        if crops is not None:
            chosen = choose_crops(crops.shape[0], crops.shape[1], self._seed, epoch)
        for rows in batches_of_rows:
            grids = self.grids[rows]
            if crops is not None:
                grids = crops[rows, chosen[rows]]
            yield self.prefix_inputs(rows), grids.long()


def choose_crops(num_rows: int, num_crops: int, seed: int, epoch: int) -> Tensor:
    """The crop of each row in one epoch, (num_rows,), a function of seed, epoch and row."""
    return torch.randint(num_crops, (num_rows,), generator=seeded_generator("crops", seed, epoch))


def read_crops(folder: Path, indices: Indices) -> Tensor | ShardedArray | None:
    """The crops of an indices folder, memory-mapped; None where it has none."""
    if not shards_of(folder, CROPS):
        return None
    return open_grids(folder, CROPS, indices.meta, len(indices.rows), "crops")


def read_conditions(folder: Path, indices: Indices) -> Tensor | ShardedArray | None:
    """The conditions of an indices folder, memory-mapped; None where it has none."""
    if indices.meta.condition is None:
        return None
    return open_grids(folder, CONDITION, indices.meta.condition, len(indices.rows))


def check_finite(vectors: np.ndarray, address: str) -> None:
    """A UserError if vectors (N, L, D) hold NaN, or infinity, which stands for "not given"."""
    for start in range(0, len(vectors), PREVIEW):
        finite = np.isfinite(vectors[start : start + PREVIEW]).all(axis=(1, 2))
        if not finite.all():
            row = start + finite.argmin() + 1
            raise UserError(f"{address} has NaN or infinity in row {row}; make it again")


def _vocabulary_of(indices: Indices) -> Vocabulary:
    """The vocabulary of a data set of indices: its codes, and its labels in order."""
    meta = indices.meta
    counts = Counter(column_of(indices.rows, "label"))
    names = tuple(sorted(counts.keys() - {""}, key=natural_order))
    grid = {field.name: getattr(meta, field.name) for field in fields(GridMeta)}
    counted = tuple(counts[name] for name in names)
    return Vocabulary(**grid, class_names=names, class_counts=counted, condition=meta.condition)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10: of digits, the number of them comes first."""
    parts = re.split(r"(\d+)", name)
    return [(len(x.lstrip("0")) if x.isdecimal() else 0, x) for x in parts] + [(0, name)]


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
