"""What changes from epoch to epoch in a training image."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from utils.data.table import seeded


class Augmentation(NamedTuple):
    """What changes from epoch to epoch in a training image: a function of seed, epoch and row."""

    horizontal_flip: bool
    random_crop: bool
    seed: int
    epoch: int

    def apply(self, images: Tensor, rows: Tensor, size: tuple[int, int], num_rows: int) -> Tensor:
        """(B, C, canvas height, canvas width) of the given rows -> (B, C, *size), uint8."""
        if not (self.random_crop or self.horizontal_flip):
            return images
        chance = _chances(self.seed, self.epoch, num_rows)[rows]
        if self.random_crop:
            spare = torch.tensor([images.shape[2] - size[0] + 1, images.shape[3] - size[1] + 1])
            corners = (chance[:, :2] * spare).long().tolist()
            images = torch.stack(
                [
                    image[:, top : top + size[0], left : left + size[1]]
                    for image, (top, left) in zip(images, corners, strict=True)
                ]
            )
        if self.horizontal_flip:
            images = torch.where((chance[:, 2] < 0.5)[:, None, None, None], images.flip(3), images)
        return images


@lru_cache(maxsize=1)
def _chances(seed: int, epoch: int, num_rows: int) -> Tensor:
    """Three random numbers for each row of an epoch, (num_rows, 3) in [0, 1)."""
    return torch.rand(num_rows, 3, generator=seeded("augmentation", seed, epoch))
