"""condition.npy of an indices folder: for every image the grid of a picture that comes with it.

Such as its segmentation, its depth or the image in low resolution (arXiv 2012.09841, section
4.1), in the indices of a tokenizer of its own. meta.json says which, under "condition".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.grid_meta import GridMeta
from utils.data.index_folder import open_array, smallest_type
from utils.data.indices import Indices, read_indices
from utils.data.table import Row

FILE = "condition.npy"


class Condition(NamedTuple):
    """What images are drawn to.

    Attributes:
        grids: (N, hc, wc), of any integer type, or None.
        rows: where they are from; none if they are unknown.
    """

    grids: Tensor | None
    rows: Sequence[Row]

    def in_turn(self, count: int, times: int) -> "Condition":
        """`count` of them, each `times` in a row, and from the first on again after the last."""
        chosen = (torch.arange(count // times) % len(self.grids)).repeat_interleave(times)
        return Condition(self.grids[chosen], [self.rows[row] for row in chosen.tolist()])


def write_conditions(folder: Path, conditions: Tensor, codebook_size: int) -> None:
    """Write condition.npy: (N, hc, wc), in the smallest unsigned type."""
    dtype = smallest_type(codebook_size)
    np.save(folder / FILE, conditions.cpu().numpy().astype(dtype))


def read_conditions(path: Path, indices: Indices) -> Tensor | None:
    """The conditions of an indices folder, (N, hc, wc); None where it has none.

    Raises:
        UserError: the file is missing, damaged or does not fit the folder.
    """
    meta = indices.meta.condition if indices.meta is not None else None
    if meta is None:
        return None
    file = path / FILE
    array = open_array(file)
    expected = (len(indices), *meta.latent_dim)
    if array.dtype.kind != "u" or array.shape != expected:
        raise UserError(
            f"{file} is damaged: {array.dtype} {array.shape} in the place of {expected}; make it "
            "again"
        )
    if array.max() >= meta.codebook_size:
        raise UserError(
            f"{file} is damaged: index {array.max()} of a codebook of {meta.codebook_size}; make "
            "it again"
        )
    return torch.from_numpy(np.array(array))


def take_conditions(path: Path, wanted: GridMeta, *, alone: bool) -> Condition:
    """The conditions in an indices folder.

    Args:
        path: of the folder.
        wanted: what they must belong to.
        alone: take the grids of a folder that has no condition.npy for conditions; this is what
            quantize_dataset.py makes of a CSV of conditions alone.

    Raises:
        UserError: there are none, or they are of another kind.
    """
    indices = read_indices(path, depth=None)
    grids = read_conditions(path, indices)
    if grids is not None:
        meta = indices.meta.condition
    elif alone:
        grids = indices.tensor()
        meta = indices.meta or GridMeta(wanted.codebook_size, indices.latent_dim)
    else:
        raise UserError(f"{path} has no conditions, which this GPT is given; add --conditions")
    wanted.check_same(meta, ("the GPT takes conditions of", str(path)))
    if grids.dim() != 3:
        raise UserError(f"{path} has {grids.shape[3]} indices a cell; conditions have one")
    return Condition(grids, indices.rows)
