"""crops.npy of an indices folder: more grids of every image, of crops of it or mirrored."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.index_folder import open_array
from utils.data.indices import Indices
from utils.data.table import seeded

FILE = "crops.npy"


class Crops:
    """What training takes in place of the grids of the images, a choice for every epoch.

    Attributes:
        array: (N, crops, h, w[, depth]), memory-mapped.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def pick(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """One of the grids of each of these rows, (n, h, w[, depth]).

        Which one is a function of seed, epoch and row alone.
        """
        chosen = _choice(seed, epoch, *self.array.shape[:2])[rows]
        return torch.from_numpy(self.array[rows.numpy(), chosen.numpy()])


@lru_cache(maxsize=1)
def _choice(seed: int, epoch: int, num_rows: int, crops: int) -> Tensor:
    """The number of the grid that every row shows in an epoch, (num_rows,)."""
    return torch.randint(crops, (num_rows,), generator=seeded("crops", seed, epoch))


def read_crops(folder: Path, indices: Indices) -> Crops | None:
    """The crops of an indices folder; None where it has none.

    Raises:
        UserError: the file is damaged, or of other grids than the folder's.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    array, first = open_array(path), indices.shards[0]
    expected = (len(indices), *first.shape[1:])
    fits = array.dtype == first.dtype and array.shape[:1] + array.shape[2:] == expected
    if not fits or array.size == 0:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, but the folder has {len(indices)} grids of "
            f"{first.dtype} {first.shape[1:]}; make it again"
        )
    largest = int(array.max())
    if largest >= indices.meta.codebook_size:
        raise UserError(
            f"{path} holds the index {largest}, but its codebook has only "
            f"{indices.meta.codebook_size} codes; make it again"
        )
    return Crops(array)
