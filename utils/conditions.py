"""condition.npy of an indices folder: for every image the grid of a picture that comes with it.

Such as its segmentation, its depth or the image in low resolution (arXiv 2012.09841, section
4.1), in the indices of a tokenizer of its own. meta.json says which, under "condition".
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError
from utils.grid_meta import GridMeta
from utils.index_folder import smallest_type

if TYPE_CHECKING:
    from utils.indices import Indices

FILE = "condition.npy"


def write_conditions(folder: Path, conditions: Tensor, codebook_size: int) -> None:
    """Write condition.npy: (N, hc, wc), in the smallest unsigned type."""
    dtype = smallest_type(codebook_size)
    np.save(folder / FILE, conditions.cpu().numpy().astype(dtype))


def read_conditions(path: Path, indices: "Indices") -> Tensor | None:
    """The conditions of an indices folder, (N, hc, wc); None where it has none.

    Raises:
        UserError: the file is missing, damaged or does not fit the folder.
    """
    meta = indices.meta.condition if indices.meta is not None else None
    if meta is None:
        return None
    file = path / FILE
    try:
        array = np.lib.format.open_memmap(file, mode="r")
        expected = (len(indices), *meta.latent_dim)
        if array.dtype.kind != "u" or array.shape != expected:
            raise ValueError(f"{array.dtype} {array.shape} in the place of {expected}")
        if array.max() >= meta.codebook_size:
            raise ValueError(f"index {array.max()} of a codebook of {meta.codebook_size}")
    except Exception as error:  # numpy raises nearly everything on a damaged header
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is damaged: {line}; make it again") from error
    return torch.from_numpy(np.array(array))


def take_conditions(path: Path, indices: "Indices", wanted: GridMeta) -> Tensor:
    """The conditions in an indices folder, or, if it has none, its grids as conditions.

    So both what quantize_dataset.py makes of images with conditions and what it makes of the
    conditions alone will do.

    Raises:
        UserError: they are not of the kind that is wanted.
    """
    conditions = read_conditions(path, indices)
    if conditions is None:
        meta = indices.meta or GridMeta(wanted.codebook_size, indices.latent_dim)
        conditions = indices.tensor()
    else:
        meta = indices.meta.condition
    wanted.check_same(meta, ("the GPT takes conditions of", str(path)))
    if conditions.dim() != 3:
        raise UserError(f"{path} has {conditions.shape[3]} indices a cell; conditions have one")
    return conditions
