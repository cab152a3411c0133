"""The GPT: a decoder-only transformer over a prefix and a grid of codebook indices."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transformer.attention import attend
from transformer.blocks import Block, Look, RMSNorm
from transformer.cache import KVCache
from transformer.config import GPTConfig
from transformer.positions import Beyond, Places

LOGITS_AT_ONCE = 1 << 26  # beyond, the loss takes them in parts


class GPT(nn.Module):
    """p(indices | class) = product over the cells, in raster order, of p(cell | earlier cells).

    The sequence is one prefix token (a class, or "no class") and the cells of the grid. The
    token at each position predicts the cell that comes next (arXiv 2012.09841, section 3.2).
    """

    PREFIX = 1  # tokens before the grid
    attend = staticmethod(attend)  # or `flex.flex_attend`

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.latent_dim is None:
            raise ValueError("a GPT needs latent_dim")
        self.config = config
        height, width = config.latent_dim
        length = self.PREFIX + height * width
        self.prefix_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.token_embedding = nn.Embedding(config.codebook_size, config.dim)
        if config.positions == "learned":
            self.position_embedding = nn.Parameter(torch.zeros(length, config.dim))
        else:
            cos, sin = self._turn(self.places(config.latent_dim))
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.codebook_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of deviation 0.02; what ends a residual branch shrinks with the depth.

        The head starts at zero, so that the first loss is log(codebook_size) exactly.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                ends_a_branch = name.endswith(("attention.out.weight", "feed_forward.out.weight"))
                depth = 2 * self.config.num_layers if ends_a_branch else 1
                nn.init.normal_(parameter, std=0.02 * depth**-0.5)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        prefix: Tensor,
        indices: Tensor,
        *,
        beyond: Beyond | None = None,
        loss: bool = False,
    ) -> Tensor:
        """Logits of every cell given the prefix and the cells before it.

        Args:
            prefix: (B,) class of each image, or `config.no_class`.
            indices: (B, h, w) of `config.latent_dim`, in [0, codebook_size).
            beyond: EXTRAPOLATE or INTERPOLATE accept any (h, w), with rotary positions.
            loss: return the cross-entropy of `indices` instead; a large one is taken in parts,
                so that the logits never stand whole.

        Returns:
            (B, h*w, codebook_size): at [b, t] the logits of cell t in raster order; with `loss`
            (B, h*w), in nats, float32.

        Raises:
            ValueError: a grid of another size than the trained one, without `beyond`.
        """
        grid = tuple(indices.shape[1:])
        turn = None
        if grid != self.config.latent_dim:
            if beyond is None:
                raise ValueError(
                    f"this GPT was made for a grid of {self.config.latent_dim}, got {grid}"
                )
            if beyond == Beyond.SLIDE:
                raise ValueError("sliding positions exist only where cells are drawn one by one")
            turn = tuple(x.to(indices.device) for x in self._turn(self.places(grid, beyond)))
        elif self.config.positions == "rotary":
            turn = self.cos, self.sin

        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if k.shape[1] < q.shape[1]:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            return self.attend(
                q, k, v, grid=grid, window=self.config.window_size, prefix=self.PREFIX
            )

        x = torch.cat(
            [self.prefix_embedding(prefix)[:, None], self.token_embedding(indices.flatten(1))],
            dim=1,
        )  # (B, 1 + h*w, dim)
        if self.config.positions == "learned":
            x = x + self.position_embedding
        x = self._run(x, turn, [look] * self.config.num_layers)
        x = x[:, self.PREFIX - 1 : -1]  # the last cell predicts nothing
        return self._loss(x, indices.flatten(1)) if loss else self.head(x)

    def _loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, (B, t), from final states (B, t, dim) and targets (B, t)."""

        def nats(states: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.head(states).float(), targets, reduction="none")

        states, cells = states.flatten(0, 1), targets.flatten()
        parts = math.ceil(len(states) * self.config.codebook_size / LOGITS_AT_ONCE)
        if parts <= 1:
            return nats(states, cells).view(targets.shape)
        # The backward pass makes the logits of each part anew.
        losses = [
            checkpoint(nats, *part, use_reentrant=False)
            for part in zip(states.chunk(parts), cells.chunk(parts), strict=True)
        ]
        return torch.cat(losses).view(targets.shape)

    def step(self, tokens: Tensor, position: int, cache: KVCache) -> Tensor:
        """Logits of the next cell, from one new token and what the cache holds of the others.

        Args:
            tokens: (B,) the prefix if `position` is 0, else the index of cell position - 1.
            position: where `tokens` stand in the sequence; all before are in the cache.
            cache: of `make_cache`, which takes the token in.

        Returns:
            (B, codebook_size), the logits of cell `position` in raster order.
        """
        cell = position - self.PREFIX
        x = (self.prefix_embedding if cell < 0 else self.token_embedding)(tokens)[:, None]
        turn = None
        if self.config.positions == "learned":
            row, column = cache.places.inside(*divmod(max(cell, 0), cache.width))
            inside = self.PREFIX + row * self.config.latent_dim[1] + column
            x = x + self.position_embedding[inside if cell >= 0 else position]
        else:
            turn = self._turn_of(position, cache)
        cache.move_to(position)
        mask = cache.mask(position)
        looks = [
            lambda q, k, v, layer=layer: cache.attend(layer, q, k, v, position, mask)
            for layer in range(self.config.num_layers)
        ]
        return self.head(self._run(x, turn, looks)[:, 0])

    def make_cache(
        self,
        batch_size: int,
        size: tuple[int, int] | None = None,
        beyond: Beyond = Beyond.SLIDE,
    ) -> KVCache:
        """An empty cache for `batch_size` grids of `size` (default: the trained one).

        Raises:
            ValueError: learned positions, which can only slide.
        """
        config, weight = self.config, self.token_embedding.weight
        return KVCache(
            num_layers=config.num_layers,
            batch_size=batch_size,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            places=self.places(size or config.latent_dim, beyond),
            window=config.window_size,
            prefix=self.PREFIX,
            device=weight.device,
            dtype=weight.dtype,
        )

    def places(self, size: tuple[int, int], beyond: Beyond = Beyond.SLIDE) -> Places:
        """Where the cells of a grid of `size` are to this model.

        Raises:
            ValueError: learned positions, which can only slide.
        """
        config = self.config
        if size != config.latent_dim and config.positions == "learned" and beyond != Beyond.SLIDE:
            raise ValueError("learned positions can neither be extrapolated nor interpolated")
        return Places(size, config.latent_dim, config.head_dim, beyond)

    def _turn(self, places: Places) -> tuple[Tensor, Tensor]:
        """cos and sin, (1 + h*w, head_dim / 2) each: the prefix, which is not turned, and cells."""
        cos, sin = places.cells(0, places.size[0])
        still = cos.new_full((self.PREFIX, cos.shape[1]), 0.0 if self.config.blank_prefix else 1.0)
        return torch.cat([still, cos]), torch.cat([torch.zeros_like(still), sin])

    def _turn_of(self, position: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        """cos and sin of the token at one position, (1, head_dim / 2) each."""
        if position < self.PREFIX or cache.places.size == self.config.latent_dim:
            here = slice(position, position + 1)
            return self.cos[here], self.sin[here]
        row, column = divmod(position - self.PREFIX, cache.width)
        if cache.row != row:  # a row at a time: grids may be tall
            cache.row = row
            cache.turns = tuple(x.to(self.cos) for x in cache.places.cells(row))
        cos, sin = cache.turns
        return cos[column : column + 1], sin[column : column + 1]

    def _run(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, looks: list[Look]) -> Tensor:
        """Embeddings (B, n, dim) -> their final states."""
        x = self.dropout(x)
        for block, look in zip(self.blocks, looks, strict=True):
            x = block(x, turn, look)
        return self.norm(x)
