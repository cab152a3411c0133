"""What samples are conditioned on: conditions, embeddings, prompts, classes by frequency."""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import addresses
from utils.cli import UserError, user_error
from utils.data.index_dataset import VECTORS, check_finite, read_conditions
from utils.data.indices import open_array, read_indices
from utils.data.sources import Row
from utils.data.vocabulary import GridMeta, Vocabulary


class Conditions(NamedTuple):
    """Conditioning grids (N, hc, wc) of any integer type or None, and the row of each."""

    grids: Any  # a ShardedArray as loaded, a Tensor once chosen
    rows: Sequence[Row]


def load_conditions(path: Path, wanted: GridMeta, *, allow_images: bool) -> Conditions:
    """The conditions in an indices folder, which must belong to `wanted`.

    With `allow_images`, a text file or a folder without condition.npy gives its own grids;
    quantize_dataset.py makes such a folder of a CSV of conditioning images.
    """
    size = wanted.codebook_size if path.is_file() else None  # which a text file does not state
    indices = read_indices(path, codebook_size=size, depth=None)
    meta, grids = indices.meta.condition, read_conditions(path, indices)
    if meta is None:
        if not allow_images:
            raise UserError(f"{path} has no conditions, which this GPT needs; add --conditions")
        meta, grids = indices.meta, indices.grids
    wanted.check_tokenizer(meta.tokenizer_sha256, path, meta, "the condition of the GPT")
    return Conditions(grids, indices.rows)


def choose_conditions(
    flags: argparse.Namespace, vocabulary: Vocabulary, count: int, *, required: bool
) -> Conditions:
    """Conditions of `count` images: --conditions in turn, or those of the completed images.

    `required`: whether the GPT cannot do without.
    """
    if vocabulary.condition is None:
        if flags.conditions:
            raise UserError(f"the GPT in {flags.model_path} takes no conditions; omit --conditions")
        return Conditions(None, [])
    if flags.conditions or flags.complete:
        path = addresses.fetch(flags.conditions or flags.complete)
        found = load_conditions(path, vocabulary.condition, allow_images=bool(flags.conditions))
        chosen = torch.arange(count) // flags.variations % len(found.rows)
        return Conditions(found.grids[chosen], [found.rows[row] for row in chosen.tolist()])
    if required:
        raise UserError(
            "this GPT needs a condition (--condition_dropout 0); pass an indices folder with "
            "conditions by --conditions"
        )
    grid = vocabulary.condition
    return Conditions(torch.full((count, *grid.latent_dim), grid.codebook_size), [])  # none


def choose_embeddings(
    flags: argparse.Namespace, vocabulary: Vocabulary, count: int, repeats: int = 1, rows: int = 0
) -> Tensor | None:
    """Vectors (count, L, D) of --embeddings in turn, each `repeats` times; without, "not given".

    None for a GPT without embeddings. A UserError if the file has another number than `rows`.
    """
    shape = vocabulary.embeddings
    if shape is None:
        if flags.embeddings:
            raise UserError(f"the GPT in {flags.model_path} takes no embeddings; omit --embeddings")
        return None
    if not flags.embeddings or flags.unconditional:
        return torch.full((count, *shape), math.inf)
    vectors = open_array(addresses.fetch(flags.embeddings), (rows or "N", *shape), VECTORS)
    vectors = np.array(vectors[np.arange(count) // repeats % len(vectors)])
    check_finite(vectors, flags.embeddings)
    return torch.from_numpy(vectors)


def read_prompts(given: Sequence[str]) -> list[str]:
    """Prompts, of which one as @FILE stands for the lines of a text file that are not empty."""
    prompts = []
    for prompt in given:
        if not prompt.startswith("@"):
            prompts.append(prompt)
            continue
        path = Path(prompt[1:])
        with user_error(f"cannot read the prompts in {path}: %s", OSError, ValueError):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        if not any(map(str.strip, lines)):
            raise UserError(f"{path} has no prompts; write one a line")
        prompts += filter(str.strip, lines)
    return prompts


def choose_texts(
    flags: argparse.Namespace, vocabulary: Vocabulary, rows: Sequence[Row], count: int
) -> tuple[list[str], ...]:
    """Labels and captions of `count` images: the given ones in turn, or else those of `rows`.

    Of several labels and prompts, each label comes with each prompt. Without any of these they have
    no caption, and all classes in turn; with prompts or --embeddings no class.
    """
    prompts = read_prompts(flags.prompt)
    captions = prompts or [row.caption for row in rows] or [""]
    labels = flags.labels or ([""] if prompts or flags.embeddings else [row.label for row in rows])
    if flags.class_frequencies:
        labels = in_proportion(vocabulary, count)
    if not labels:
        labels = [""] if flags.unconditional else [*vocabulary.class_names] or [""]
    pairs = [*itertools.product(labels, prompts)] if flags.labels and prompts else []
    texts = [*zip(*pairs, strict=True)] or (labels, captions)
    return tuple([given[n % len(given)] for n in range(count)] for given in texts)


def in_proportion(vocabulary: Vocabulary, number: int) -> list[str]:
    """`number` classes, each as often as its count demands, evenly mixed from the first on."""
    if not vocabulary.class_counts:
        raise UserError(
            "this GPT's vocabulary does not hold how often each class occurs; omit "
            "--class_frequencies and give --labels, or train the GPT again"
        )
    shares = np.array(vocabulary.class_counts).clip(1e-9) / sum(vocabulary.class_counts)
    counts = np.ceil(shares * number).astype(int) + 1
    classes = np.repeat(np.arange(len(counts)), counts)
    k = np.arange(len(classes)) - np.repeat(counts.cumsum() - counts, counts)
    due = (k + 0.5) / shares[classes]  # the k-th image of a class: after so many of all
    return [vocabulary.class_names[index] for index in classes[due.argsort(kind="stable")[:number]]]
