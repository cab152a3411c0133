"""Keys and values of the cells that are still in sight, while a grid is drawn cell by cell."""

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.attention import scaled_dot_product_attention, window_is_full, window_mask
from transformer.positions import Places, PositionExtension, rotate


class KVCache:
    """Keys and values of all layers for one batch of grids, allocated once.

    The prefix has slots of its own. Behind it the cells stand in a ring of as many rows as the
    window reaches: cell c takes the slot of cell c - rows * w, which no later cell sees. So the
    memory does not depend on the height of the grid; without a window all rows are kept. A cell
    is `depth` tokens, each with a slot.

    Attributes:
        places: where the cells are, in a grid of `places.size`.
        keys, values: of each layer (B, kv_heads, prefix + rows * w * depth, head_dim); tensors of
            their own, because a compiler copies the whole of a tensor whose parts are written.
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
        self.window = 0 if window_is_full(window, places.size) else window
        self.ring = (min(self.window, height) or height) * self.width * depth
        shape = (batch_size, kv_heads, prefix + self.ring, head_dim)
        self.device = device
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
            for _ in range(2)
        )
        self._prefix_keys: Tensor | None  # as they are seen from within the trained grid
        self._offset: tuple[int, int]
        self.row: int  # that is being drawn
        self.turns: tuple[Tensor, ...]  # cos and sin of its cells
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def slot(self, position: int) -> int:
        """Where the token at a position of the sequence is kept."""
        token = position - self.prefix
        return position if token < 0 else self.prefix + token % self.ring

    def cell(self, position: int) -> tuple[int, int]:
        """Row and column of the token at a position behind the prefix."""
        return divmod((position - self.prefix) // self.depth, self.width)

    def reset(self) -> None:
        """Forget the batch before; slots count from when they are written, and need no zeros."""
        self._prefix_keys, self._offset = None, (0, 0)
        self.row, self.turns = -1, ()

    def sees(self, token: Tensor, slots: int) -> Tensor:
        """Which of the prefix and the first `slots` slots of the ring a token sees.

        Args:
            token: (1,), its number behind the prefix; its own slot is written already.
            slots: at most `ring`.

        Returns:
            (1, prefix + slots), bool.
        """
        numbers = torch.arange(slots, device=token.device)
        held = token - (token - numbers) % self.ring  # the token in each slot: the latest that fits
        shape = {"width": self.width, "window": self.window, "depth": self.depth}
        near = window_mask(token, held, prefix=0, **shape) & (held >= 0)
        return F.pad(near, (self.prefix, 0), value=True)

    def mask(self, position: int) -> Tensor | None:
        """Which of the slots in use the token at `position` sees, (1, slots); None: all."""
        token = position - self.prefix
        if token < 0 or self.window == 0:
            return None
        here = torch.full((1,), token, device=self.device)
        return self.sees(here, min(token + 1, self.ring))

    def move_to(self, position: int) -> None:
        """Show the prefix as the cell at `position` is to see it (see `Places.offset`)."""
        if position < self.prefix or self.places.position_extension != PositionExtension.SLIDE:
            return
        offset = self.places.offset(*self.cell(position))
        if offset == self._offset:
            return
        shown = [keys[:, :, : self.prefix] for keys in self.keys]
        if self._prefix_keys is None:
            self._prefix_keys = torch.stack(shown)
        turn = self.places.turn(torch.tensor([offset[0]]), torch.tensor([offset[1]]))
        cos, sin = (x.to(self.device) for x in turn)
        turned = rotate(self._prefix_keys, cos, sin).type_as(self._prefix_keys)
        torch._foreach_copy_(shown, list(turned.unbind()))
        self._offset = offset

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v (B, kv_heads, prefix + n, head_dim) of the prefix and n tokens behind."""
        tokens = k.shape[2] - self.prefix
        first = max(0, tokens - self.ring)  # those before are out of sight already
        slots = torch.arange(first, tokens, device=k.device) % self.ring + self.prefix
        for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
            cached[:, :, : self.prefix] = new[:, :, : self.prefix]
            cached[:, :, slots] = new[:, :, self.prefix + first :].to(cached)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, position: int, mask: Tensor | None
    ) -> Tensor:
        """Store k and v of the token at `position`, and attend from q to all that is in sight.

        Args:
            q: (B, heads, n, head_dim) of the tokens from `position` on; n > 1 only for the prefix.
            k, v: (B, kv_heads, n, head_dim) of the same tokens.
            mask: of `mask(position)`.

        Returns:
            (B, heads, n, head_dim).
        """
        new, first = q.shape[2], self.slot(position)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, first : first + new] = k
        values[:, :, first : first + new] = v
        stop = min(position + new, self.prefix + self.ring)
        keys, values = keys[:, :, :stop], values[:, :, :stop]
        if new > 1:  # the prefix, all at once
            groups = q.shape[1] // k.shape[1]
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
            return scaled_dot_product_attention(q, keys, values, is_causal=True)
        # Heads that share keys are further queries of one head: (B, kv_heads, groups, head_dim).
        queries = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return _attend_few(queries, keys, values, mask).view(q.shape)


def _attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
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
