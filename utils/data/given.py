"""Grids of which some cells are given: what --complete and --mask say."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils import cli
from utils.data.decoding import read_mask
from utils.data.indices import read_indices
from utils.data.vocabulary import Vocabulary

SIDES = ("top", "bottom", "left", "right")


def keep_side(text: str, size: tuple[int, int]) -> Tensor:
    """The cells that stay of a grid of `size`, (h, w), bool: `top:0.5` is its upper half.

    Raises:
        ValueError: no side and share of it, or a share that leaves nothing to draw.
    """
    side, _, share = text.partition(":")
    try:
        kept = float(share)
    except ValueError:
        kept = -1.0
    if side not in SIDES or not 0 <= kept <= 1:
        raise ValueError(f"expected {', '.join(SIDES)} and a share, as top:0.5, got {text!r}")
    height, width = size
    vertical = side in ("top", "bottom")
    length = height if vertical else width
    line = torch.arange(length) < round(kept * length)
    if line.all():
        raise ValueError(f"{text} of a grid of {height}x{width} cells leaves nothing to draw")
    line = line.flip(0) if side in ("bottom", "right") else line
    return (line[:, None] if vertical else line).expand(height, width)


class Given(NamedTuple):
    """What is to be completed.

    Attributes:
        grids: (N, h, w), or (N, h, w, depth) for a depth above 1, int64.
        keep: (h, w), bool, the cells that stay.
        labels: N.
    """

    grids: Tensor
    keep: Tensor
    labels: list[str]


def read_given(path: Path, vocabulary: Vocabulary, keep: str, count: int, times: int) -> Given:
    """The first grids of an indices folder or text file, and which of their cells stay.

    Args:
        path: of the folder or file.
        vocabulary: of the GPT that is to complete them.
        keep: a side and a share, see `keep_side`, or the path of a picture that is white there.
        count: how many grids, at most.
        times: each is repeated.

    Raises:
        UserError: indices of another tokenizer, or a `keep` that says nothing.
    """
    indices = read_indices(
        path,
        latent_dim=None if path.is_dir() else vocabulary.latent_dim,  # a folder says it itself
        codebook_size=vocabulary.codebook_size,
        depth=vocabulary.depth,
    )
    if indices.meta is not None:
        vocabulary.check_tokenizer(indices.meta.tokenizer_sha256, path)
    if keep.partition(":")[0] in SIDES:
        stays = cli.build(keep_side, keep, indices.latent_dim)
    else:
        stays = torch.from_numpy(read_mask(keep, indices.latent_dim))
    labels = [row.label for row in indices.rows[:count] for _ in range(times)]
    return Given(indices.tensor()[:count].long().repeat_interleave(times, dim=0), stays, labels)
