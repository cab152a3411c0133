"""Keys and values of the tokens inside the window, while a grid is generated token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.config import GPTConfig
from transformer.rope import (
    GridPositions,
    PositionExtension,
    rotary_cos_sin,
    rotate,
    visible_mask,
    window_is_full,
)


class KVCache:
    """Keys and values of all layers for one batch of grids, allocated once.

    The prefix has slots of its own. Behind them is a ring of as many rows of the grid as the window
    reaches: a token takes the slot of the token `ring` before it, which no later token attends to.
    So the memory does not depend on the height of the grid; without a window all rows are kept.

    A token is written by its position, a tensor; so `attend` is the same computation for every
    token, which a CUDA graph can capture. What must be a number on the host is set by `prepare`.

    Attributes:
        grid: positions of the grid that is generated.
        keys, values: of each layer (B, kv_heads, prefix + ring, head_dim); tensors of their own,
            because a compiler copies the whole of a tensor whose parts are written.
        slots: how many slots of the ring `attend` reads.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        grid: GridPositions,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.grid, self.prefix, self.device = grid, config.prefix_length, device
        self.rope_base = config.rope_base
        height, self.width = grid.size
        self.window = 0 if window_is_full(config.window_size, grid.size) else config.window_size
        self.ring = min(self.window or height, height) * self.width * grid.depth
        slots = self.prefix + self.ring
        shape = (config.num_layers, batch_size, config.num_kv_heads, slots, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape[1:], device=device, dtype=dtype) for _ in range(shape[0])]
            for _ in range(2)
        )
        self._prefix_keys: list[Tensor]  # as a position inside the trained grid attends to them
        self._offset: tuple[int, int]
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def reset(self) -> None:
        """Begin another batch; slots are masked until they are written, and need no zeros."""
        self._prefix_keys, self._offset = [], (0, 0)
        self.slots, self._all_visible = self.ring, False

    def prepare(self, token: int, parts: int | None = None) -> int:
        """Get ready for the token with this raster number, before the model is called with it.

        Limits `attend` to the slots that are written by then and, in grids larger than the
        trained one, rotates the prefix by the distance of the token (see `GridPositions.offsets`).

        Args:
            token: counted from 0 behind the prefix.
            parts: round the slots up to a multiple of 1/parts of the ring, so that few different
                computations occur; default: read exactly the written ones.

        Returns:
            The number of slots that are read.
        """
        written = min(token + 1, self.ring)
        part = 1 if parts is None else -(-self.ring // parts)
        self.slots = min(-(-written // part) * part, self.ring)
        self._all_visible = self.window == 0 and self.slots == token + 1
        if self.grid.size != self.grid.trained and self.grid.extension == PositionExtension.SLIDE:
            offset = self.grid.offsets(self.grid.at(torch.tensor(token)))
            if tuple(offset.tolist()) != self._offset:
                self._rotate_prefix(offset)
        return self.slots

    def _rotate_prefix(self, offset: Tensor) -> None:
        shown = [keys[:, :, : self.prefix] for keys in self.keys]
        self._prefix_keys = self._prefix_keys or [keys.clone() for keys in shown]
        cos, sin = rotary_cos_sin(offset.to(self.device), shown[0].shape[-1], self.rope_base)
        for keys, original in zip(shown, self._prefix_keys, strict=True):
            keys.copy_(rotate(original, cos, sin))
        self._offset = tuple(offset.tolist())

    def mask(self, tokens: Tensor) -> Tensor | None:
        """Which slots the tokens with these raster numbers (T,) attend to; None: all that are read.

        Returns:
            (T, prefix + slots), bool.
        """
        if self._all_visible and len(tokens) == 1:
            return None
        # Each slot holds the latest token that belongs there.
        slots = torch.arange(self.slots, device=tokens.device)
        held = tokens[-1] - (tokens[-1] - slots) % self.ring
        shape = {"width": self.width, "window": self.window, "depth": self.grid.depth}
        visible = visible_mask(tokens, held, prefix=0, **shape) & (held >= 0)
        return F.pad(visible, (self.prefix, 0), value=True)

    def write_first(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v (B, kv_heads, prefix + n, head_dim) of a sequence that begins."""
        count = k.shape[2] - self.prefix
        first = max(0, count - self.ring)  # no later token attends to those before
        slots = torch.arange(first, count, device=k.device) % self.ring + self.prefix
        for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
            cached[:, :, : self.prefix] = new[:, :, : self.prefix]
            cached[:, :, slots] = new[:, :, self.prefix + first :].to(cached)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Store k and v of some tokens of one row, and attend from q to all that the mask shows.

        Args:
            q: (B, heads, T, head_dim).
            k, v: (B, kv_heads, T, head_dim).
            tokens: (T,), their raster numbers, in rising order.
            mask: of `mask(tokens)`.

        Returns:
            (B, heads, T, head_dim).
        """
        stop, slots = self.prefix + self.slots, tokens % self.ring + self.prefix
        keys = self.keys[layer].index_copy_(2, slots, k)[:, :, :stop]
        values = self.values[layer].index_copy_(2, slots, v)[:, :, :stop]
        # Heads that share keys become further queries of one head: (B, kv_heads, groups * T, d).
        groups = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (-1, groups)).flatten(2, 3)
        if mask is not None and groups > 1:
            mask = mask.repeat(groups, 1)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return y.reshape(q.shape)
