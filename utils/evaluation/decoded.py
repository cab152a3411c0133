"""Grids of codebook indices as a source of images."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from utils.data.table import Row


class DecodedImages:
    """What a tokenizer makes of grids of indices, used as an `ImageDataset` is.

    Attributes:
        grids: (N, h, w[, depth]), of any integer type.
        rows: what each of them is.
        channels, size: of the images.
    """

    def __init__(
        self,
        grids: Tensor,
        rows: Sequence[Row],
        decode: Callable[[Tensor], Tensor],
        channels: int,
        size: tuple[int, int],
    ) -> None:
        self.grids, self.rows, self.channels, self.size = grids, rows, channels, size
        self._decode = decode

    def __len__(self) -> int:
        return len(self.grids)

    @torch.no_grad()
    def batches(self, batches_of_rows: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images of each batch of row numbers, (B, C, H, W) in [-1, 1].

        Their values are those of 8-bit images, as if they had been saved and read.
        """
        for rows in batches_of_rows:
            images = self._decode(self.grids[rows].long().to(device))
            yield images.add(1).mul(127.5).round().div(127.5).sub(1)
