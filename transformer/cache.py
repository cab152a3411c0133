"""Keys and values of the cells that are still in sight, while a grid is drawn cell by cell."""

import torch
from torch import Tensor

from transformer.attention import covers, scaled_dot_product_attention, window_mask
from transformer.positions import Beyond, Places, rotate


class KVCache:
    """Keys and values of all layers for one batch of grids, allocated once.

    The prefix has slots of its own. Behind it the cells stand in a ring of as many rows as the
    window reaches: cell c takes the slot of cell c - rows * w, which no later cell sees. So the
    memory does not depend on the height of the grid; without a window all rows are kept. A cell
    is `depth` tokens, each with a slot.

    Attributes:
        places: where the cells are, in a grid of `places.size`.
        keys, values: (num_layers, B, kv_heads, prefix + rows * w * depth, head_dim).
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        places: Places,
        window: int,
        prefix: int,
        depth: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.places, self.prefix, self.depth = places, prefix, depth
        height, self.width = places.size
        self.window = 0 if covers(window, places.size) else window
        self.ring = (min(self.window, height) or height) * self.width * depth
        shape = (num_layers, batch_size, kv_heads, prefix + self.ring, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._prefix_keys: Tensor | None = None  # as they are seen from within the trained grid
        self._offset = (0, 0)
        self.row, self.turns = -1, ()  # cos and sin of the row that is being drawn

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def slot(self, position: int) -> int:
        """Where the token at a position of the sequence is kept."""
        token = position - self.prefix
        return position if token < 0 else self.prefix + token % self.ring

    def cell(self, position: int) -> tuple[int, int]:
        """Row and column of the token at a position behind the prefix."""
        return divmod((position - self.prefix) // self.depth, self.width)

    def mask(self, position: int) -> Tensor | None:
        """Which of the slots in use the token at `position` sees, (1, slots); None: all."""
        token = position - self.prefix
        if token < 0 or self.window == 0:
            return None
        slots = torch.arange(min(token + 1, self.ring), device=self.keys.device)
        held = token - (token - slots) % self.ring  # the token in each slot: the latest that fits
        positions = torch.cat([slots.new_tensor(range(self.prefix)), held + self.prefix])
        return window_mask(
            slots.new_tensor([position]),
            positions,
            width=self.width,
            window=self.window,
            prefix=self.prefix,
            depth=self.depth,
        )

    def move_to(self, position: int) -> None:
        """Show the prefix as the cell at `position` is to see it (see `Places.offset`)."""
        if position < self.prefix or self.places.beyond != Beyond.SLIDE:
            return
        offset = self.places.offset(*self.cell(position))
        if offset == self._offset:
            return
        if self._prefix_keys is None:
            self._prefix_keys = self.keys[:, :, :, : self.prefix].clone()
        turn = self.places.turn(torch.tensor([offset[0]]), torch.tensor([offset[1]]))
        cos, sin = (x.to(self.keys) for x in turn)
        self.keys[:, :, :, : self.prefix] = rotate(self._prefix_keys, cos, sin)
        self._offset = offset

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, position: int, mask: Tensor | None
    ) -> Tensor:
        """Store k and v of the token at `position`, and let q look at all that is in sight.

        Args:
            q: (B, heads, n, head_dim) of the tokens from `position` on; n > 1 only for the prefix.
            k, v: (B, kv_heads, n, head_dim) of the same tokens.
            mask: of `mask(position)`.

        Returns:
            (B, heads, n, head_dim).
        """
        new, first = q.shape[2], self.slot(position)
        self.keys[layer, :, :, first : first + new] = k
        self.values[layer, :, :, first : first + new] = v
        stop = min(position + new, self.prefix + self.ring)
        keys, values = self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]
        if new > 1:  # the prefix, all at once
            groups = q.shape[1] // k.shape[1]
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
            return scaled_dot_product_attention(q, keys, values, is_causal=True)
        # Heads that share keys are further queries of one head: (B, kv_heads, groups, head_dim).
        queries = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return _look(queries, keys, values, mask).view(q.shape)


def _look(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a few queries (B, heads, n, d) to keys and values (B, heads, S, d).

    On a CPU PyTorch's own is made for many queries: for one it takes 1.6 times as long as this
    (256 x 4 heads of 49 x 48).
    """
    if q.device.type != "cpu":
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v
