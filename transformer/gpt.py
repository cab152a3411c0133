"""The GPT: a decoder-only transformer over a prefix and a grid of codebook indices."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer.attention import attend
from transformer.blocks import Attend, Block, RMSNorm
from transformer.cache import KVCache
from transformer.config import GPTConfig
from transformer.head import Head
from transformer.positions import PositionExtension
from transformer.sequence import Sequence


class GPT(nn.Module):
    """p(indices | prefix) = product over the tokens, in raster order, of p(token | those before).

    The sequence is the prefix (a class and perhaps a condition, see transformer/prefix.py) and
    the cells of the grid, row by row, each of them `config.depth` tokens. The token at each
    position predicts the one that comes next (arXiv 2012.09841, section 3.2).
    """

    attend = staticmethod(attend)  # or of transformer/flex.py

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.latent_dim is None:
            raise ValueError("a GPT needs latent_dim")
        self.config, self.sequence = config, Sequence(config)
        height, width = config.latent_dim
        self.prefix_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        if config.condition_latent_dim is not None:
            self.condition_embedding = nn.Embedding(config.condition_codebook_size + 1, config.dim)
        # The codes of each depth are words of their own.
        self.token_embedding = nn.Embedding(config.depth * config.codebook_size, config.dim)
        if config.positions == "learned":
            length = config.prefix_length + height * width
            self.position_embedding = nn.Parameter(torch.zeros(length, config.dim))
        else:
            cos, sin = self.sequence.turn(self.sequence.places(config.latent_dim))
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if config.order_anneal is not None:
            self.target_embedding = nn.Embedding(height * width, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        self.head = Head(config.dim, config.codebook_size, config.depth)
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
        order: Tensor | None = None,
        *,
        position_extension: PositionExtension | None = None,
        loss: bool = False,
    ) -> Tensor:
        """Logits of every token given the prefix and the tokens before it.

        Args:
            prefix: (B,) class of each image, or `config.no_class`; with a condition
                (B, 1 + hc*wc), see `make_prefix`.
            indices: (B, h, w) of `config.latent_dim`, in [0, codebook_size); with a depth above 1
                (B, h, w, depth).
            order: (B, h*w), permutations of the cells to predict them in, of a model with
                `order_anneal`; default: raster order.
            position_extension: EXTRAPOLATE or INTERPOLATE accept any (h, w), with rotary positions.
            loss: return the cross-entropy of `indices` instead; a large one is taken in parts,
                so that the logits never stand whole.

        Returns:
            (B, n, codebook_size), n = h*w*depth: at [b, t] the logits of token t in raster order,
            depth innermost, or in `order`; with `loss` (B, n), in nats, float32.

        Raises:
            ValueError: a grid of another size than the trained one, without
                `position_extension`; an order
                that the model was not made for.
        """
        config, grid = self.config, tuple(indices.shape[1:3])
        turn = self._turn_in(grid, position_extension)  # (p + n, head_dim / 2) each
        tokens = indices.flatten(1)  # (B, n)
        x = self._embed_all(prefix, tokens)  # (B, p + n, dim)
        if order is not None:
            x, tokens, turn = self.sequence.reorder(order, x, tokens, turn)
        if config.order_anneal is not None:
            x = x + self._targets(order)

        attend = self._attend_in(grid)
        x = self.run_blocks(x, turn, lambda layer: attend)
        x = x[:, config.prefix_length - 1 : -1]  # (B, n, dim); the last token predicts nothing
        return self.head.loss(x, tokens) if loss else self.head(x)

    def step(self, tokens: Tensor, position: int, cache: KVCache) -> Tensor:
        """Logits of the next token, from new ones and what the cache holds of the others.

        Args:
            tokens: the whole prefix, as in `forward`, if `position` is 0; else (B,) one index.
            position: where `tokens` begin in the sequence; all before are in the cache.
            cache: of `make_cache`, which takes the tokens in.

        Returns:
            (B, codebook_size), the logits of the token that comes next.
        """
        config = self.config
        token = position - config.prefix_length  # below 0: the prefix
        after = max(token + 1, 0)  # the token that comes next
        x = self._embed(tokens[:, None], token) if position else self._embed_prefix(tokens)
        new, turn = x.shape[1], None
        if config.positions == "rotary":
            turn = self._turn_of(position, new, cache)
        elif position:
            x = x + self.position_embedding[config.prefix_length + self._inside(token, cache)]
        else:
            x = x + self.position_embedding[:new]
        if config.order_anneal is not None:
            target = self.target_embedding.weight[self._inside(after, cache)]
            x = torch.cat([x[:, :-1], x[:, -1:] + target], dim=1)
        cache.move_to(position)
        mask = cache.mask(position)

        def attention_of(layer: int) -> Attend:
            return lambda q, k, v: cache.attend(layer, q, k, v, position, mask)

        return self.head.at(after % config.depth, self.run_blocks(x, turn, attention_of)[:, -1])

    def prefill(self, prefix: Tensor, given: Tensor, cache: KVCache) -> Tensor:
        """`step` of the prefix and of the first rows of a grid in one pass.

        Args:
            prefix: as in `forward`.
            given: (B, r, w) or (B, r, w, depth), fewer rows than the grid has.
            cache: of `make_cache` for the trained size, which takes them in.

        Returns:
            (B, codebook_size), the logits of the first token behind these rows.
        """
        tokens = given.flatten(1)
        x = self._embed_all(prefix, tokens)
        new, turn = x.shape[1], None
        if self.config.positions == "rotary":
            turn = self.cos[:new], self.sin[:new]
        if self.config.order_anneal is not None:
            x = x + self._targets(None)[:new]
        attend = self._attend_in(tuple(given.shape[1:3]))

        def attention_of(layer: int) -> Attend:
            def attend_and_keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache.fill(layer, k, v)
                return attend(q, k, v)

            return attend_and_keep

        return self.head.at(0, self.run_blocks(x, turn, attention_of)[:, -1])

    def run_blocks(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        attention_of: Callable[[int], Attend],
    ) -> Tensor:
        """Embeddings (B, T, dim) -> their final states (B, T, dim).

        Args:
            x: of T tokens.
            turn: cos and sin, see `SelfAttention`.
            attention_of: number of a layer -> its attention.
        """
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, turn, attention_of(layer))
        return self.norm(x)

    def make_cache(
        self,
        batch_size: int,
        size: tuple[int, int] | None = None,
        position_extension: PositionExtension = PositionExtension.SLIDE,
    ) -> KVCache:
        """An empty cache for `batch_size` grids of `size` (default: the trained one).

        Raises:
            ValueError: see `Sequence.places`.
        """
        config, weight = self.config, self.token_embedding.weight
        return KVCache(
            num_layers=config.num_layers,
            batch_size=batch_size,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            places=self.sequence.places(size or config.latent_dim, position_extension),
            window=config.window_size,
            prefix=config.prefix_length,
            depth=config.depth,
            device=weight.device,
            dtype=weight.dtype,
        )

    def cast(self, dtype: torch.dtype) -> "GPT":
        """This model with weights of `dtype`, to draw with; positions keep their precision."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def _embed_all(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """The prefix and the first n tokens of the grid (B, n) -> (B, p + n, dim)."""
        x = torch.cat([self._embed_prefix(prefix), self._embed(tokens)], dim=1)
        if self.config.positions == "learned":
            x = x + self.sequence.by_token(self.position_embedding)[: x.shape[1]]
        return x

    def _attend_in(self, grid: tuple[int, int]) -> Attend:
        """Attention over the prefix and all cells of a grid."""
        config = self.config
        shape = {"window": config.window_size, "prefix": config.prefix_length}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if k.shape[1] < q.shape[1]:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            return self.attend(q, k, v, grid=grid, depth=config.depth, **shape)

        return attend

    def _embed_prefix(self, prefix: Tensor) -> Tensor:
        """The prefix (B,) or (B, p) -> (B, p, dim)."""
        classes, conditions = prefix.reshape(len(prefix), -1).tensor_split([1], dim=1)
        if 1 + conditions.shape[1] != self.config.prefix_length:
            raise ValueError(
                f"this GPT takes a class and {self.config.prefix_length - 1} cells of a condition, "
                f"got {conditions.shape[1]} cells"
            )
        x = self.prefix_embedding(classes)
        if self.config.condition_latent_dim is None:
            return x
        return torch.cat([x, self.condition_embedding(conditions)], dim=1)

    def _embed(self, indices: Tensor, first: int = 0) -> Tensor:
        """Indices (B, n) of the tokens from `first` on -> (B, n, dim)."""
        if self.config.depth > 1:
            depths = torch.arange(first, first + indices.shape[1], device=indices.device)
            indices = indices + depths % self.config.depth * self.config.codebook_size
        return self.token_embedding(indices)

    def _targets(self, order: Tensor | None) -> Tensor:
        """Which cell each position predicts, embedded: (p + n, dim), or (B, p + n, dim)."""
        cells = self.target_embedding.weight if order is None else self.target_embedding(order)
        tokens = cells.repeat_interleave(self.config.depth, dim=-2)
        return F.pad(tokens, (0, 0, self.config.prefix_length - 1, 1))

    def _inside(self, token: int, cache: KVCache) -> int:
        """The cell of the trained grid that a token's cell takes the place of, in raster order."""
        row, column = cache.places.inside(*divmod(token // self.config.depth, cache.width))
        return row * self.config.latent_dim[1] + column

    def _turn_in(
        self, grid: tuple[int, int], position_extension: PositionExtension | None
    ) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the whole sequence, for rotary positions."""
        if grid != self.config.latent_dim:
            if position_extension is None:
                raise ValueError(
                    f"this GPT was made for a grid of {self.config.latent_dim}, got {grid}"
                )
            if position_extension == PositionExtension.SLIDE:
                raise ValueError("sliding positions exist only where cells are drawn one by one")
            turn = self.sequence.turn(self.sequence.places(grid, position_extension))
            return tuple(angle.to(self.head.weight.device) for angle in turn)
        return (self.cos, self.sin) if self.config.positions == "rotary" else None

    def _turn_of(self, position: int, new: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        """cos and sin of `new` tokens from a position on, (new, head_dim / 2) each."""
        if position < self.config.prefix_length or cache.places.size == self.config.latent_dim:
            here = slice(position, position + new)
            return self.cos[here], self.sin[here]
        row, column = cache.cell(position)
        if cache.row != row:  # a row at a time: grids may be tall
            cache.row = row
            cache.turns = tuple(x.to(self.cos) for x in cache.places.cells(row))
        cos, sin = cache.turns
        return cos[column : column + 1], sin[column : column + 1]
