"""The GPT: a decoder-only transformer over a prefix and a grid of codebook indices.

One forward serves training, prefill and decoding, of sequences as in `transformer.attention`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer.attention import KVCache, attend
from transformer.config import FORMAT_VERSION, GPTConfig
from transformer.layers import Block, Head, LoRALinear, RMSNorm, Rotary, VectorProjection
from transformer.rope import (
    GridPositions,
    PositionExtension,
    random_order_probability,
    rotary_cos_sin,
    sample_permutations,
)

STD = 0.02  # of the initial weights


class GPT(nn.Module):
    """p(indices | prefix) = product over the tokens of p(token | prefix and the tokens before it).

    Each element predicts the token that comes next, the last one of the prefix the first token.
    """

    caption_embedding: nn.Embedding  # where the config has captions

    def __init__(self, config: GPTConfig, attend: Callable[..., Tensor] = attend) -> None:
        """Build and initialise the layers; `attend` may be a `FlexAttention`."""
        super().__init__()
        self.config, self.attend, self.prefix_length = config, attend, config.prefix_length
        size, scale = config.latent_dim, config.position_scale
        self.grid = GridPositions(size, size, config.depth, scale=scale)
        positions = math.prod(config.latent_dim)
        for part in config.prefix_parts:
            layer: Any = VectorProjection if part.dim else nn.Embedding
            shape = (part.length, part.dim) if part.dim else (part.null + 1,)
            self.add_module(part.layer, layer(*shape, config.dim))
        rows = config.depth * config.codebook_size
        self.token_embedding = nn.Embedding(rows, config.dim)
        if config.positions != "rotary":
            rows = self.prefix_length + positions
            self.position_embedding = nn.Parameter(torch.zeros(rows, config.dim))
        if config.order_anneal is not None:
            self.target_embedding = nn.Embedding(positions, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        self.head = Head(config.dim, config.codebook_size, config.depth)
        if config.tie_embeddings:  # an attribute, saved and counted once
            del self.head.weight
            object.__setattr__(self.head, "weight", self.token_embedding.weight)
        self._initialise()

    def _initialise(self) -> None:
        """Normal matrices and embeddings of deviation 0.02, as in GPT-2 and LlamaGen.

        What ends a residual branch starts smaller in deeper models, as in GPT-2. The head starts
        at zero, as in LlamaGen, so that the first loss is log(codebook_size) exactly.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=STD)
        if self.config.positions != "rotary":
            nn.init.normal_(self.position_embedding, std=STD)
        for block in self.blocks:
            for layer in (block.attention.out, block.feed_forward.out):
                nn.init.normal_(layer.weight, std=STD * (2 * len(self.blocks)) ** -0.5)
        if not self.config.tie_embeddings:
            nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def use_codebook(self, codes: Tensor) -> None:
        """Before a training: embeddings and neighbours of codes (K, D), as the config has them.

        A random projection keeps the ratios of distances (Johnson and Lindenstrauss, 1984).
        """
        codes = codes.float()
        if self.config.start_from_codebook:
            projection = torch.randn(codes.shape[1], self.config.dim).to(codes)
            embeddings = (codes - codes.mean(dim=0)) @ projection
            self.token_embedding.weight.copy_(embeddings * (STD / embeddings.std()))
        if self.config.label_smoothing:
            self.head.smooth_labels(codes, self.config.label_smoothing)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        prefix: Tensor | None = None,
        next_positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states from which `head` predicts.

        With a prefix a sequence begins: the tokens attend to the prefix and to each other, and are
        written to the cache, if there is one. Without, they attend to what the cache holds.

        Args:
            tokens: (B, T) indices. In a window's model that begins, whole rows in raster order.
            positions: (T, 3), or (B, T, 3) for an order per image: row, column and depth of each;
                with a cache, the last may occur several times, see `KVCache.prepare`.
            prefix: see `make_prefix`.
            next_positions: what each element predicts, for a model with `order_anneal`; with a
                prefix one longer. Default: the token after it, by raster order after the last.
            cache: of `make_cache`, `prepare`d for the last of the tokens.

        Returns (B, T, dim); with a prefix (B, 1 + T, dim), whose first state predicts the first
        token. Where the loss has a part of text, states that predict the caption are before it.
        """
        config, begins = self.config, prefix is not None
        grid = self.grid if cache is None else cache.grid
        # Each depth has embeddings of its own.
        if config.depth > 1:
            tokens = tokens + positions[..., 2] * config.codebook_size
        x = self.token_embedding(tokens)
        if prefix is not None:
            parts = config.split_prefix(prefix)
            embedded = [getattr(self, part.layer)(given) for part, given in parts]
            x = torch.cat([*embedded, x], dim=1)  # (B, P + T, dim)
        if config.positions != "rotary":
            lengths = [self.prefix_length, math.prod(config.latent_dim)]
            of_prefix, of_grid = self.position_embedding.split(lengths)
            learned = grid.embed(positions, of_grid)
            if begins:
                of_prefix = of_prefix.expand(*learned.shape[:-2], -1, -1)
                learned = torch.cat([of_prefix, learned], dim=-2)
            x = x + learned
        if config.order_anneal is not None:
            if next_positions is None:
                last = grid.numbers(positions[..., -1:, :]) + 1
                last = grid.at(last) if last.numel() else grid.raster(x.device)[:1]
                following = positions if begins else positions[..., 1:, :]
                next_positions = torch.cat([following, last], dim=-2)
            target = grid.embed(next_positions, self.target_embedding.weight)
            x = x + F.pad(target, (0, 0, x.shape[1] - target.shape[-2], 0))

        rotary = None if config.positions == "learned" else self._rotary(grid, positions, begins)
        attend_in = self._attention(grid, positions, cache, begins)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, partial(attend_in, layer))
        x = self.norm(x)
        return x[:, self.prefix_length - 1 - self._predicted_text() :] if begins else x

    def flatten(self, indices: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Grids (B, h, w[, depth]) -> tokens (B, n), depth innermost, and their positions (n, 3).

        A model with `order_anneal` takes an order (B, h * w), a permutation of the latent positions
        of each image; positions are (B, n, 3) then.
        """
        size = tuple(indices.shape[1:3])
        if size != self.grid.size:
            raise ValueError(f"this GPT has a grid of {self.grid.size}, got {size}")
        tokens, positions = indices.flatten(1), self.grid.raster(indices.device)
        if order is None:
            return tokens, positions
        if self.config.order_anneal is None:
            raise ValueError("only a GPT with order_anneal takes orders")
        order = self.grid.with_depths(order)
        return tokens.gather(1, order), positions[order]

    def logits(self, prefix: Tensor, indices: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits (B, n, codebook_size) of all tokens in order; arguments as of `flatten`."""
        tokens, positions = self.flatten(indices, order)
        return self.head(self(tokens, positions, prefix=prefix)[:, :-1])

    def loss(
        self,
        prefix: Tensor,
        indices: Tensor,
        order: Tensor | None = None,
        *,
        forward: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Cross-entropy (B, n) of all tokens in order, nats, float32; see `flatten`, `Head`.

        `forward` is this model as wrapped for several processes. Compile this method for training:
        compiled apart from `forward`, the head makes a step on a GPU 10 % longer.
        """
        tokens, positions = self.flatten(indices, order)
        hidden, text = (forward or self)(tokens, positions, prefix=prefix), self._predicted_text()
        nats = self.head(hidden[:, text:-1], tokens)
        return nats + self._text_loss(hidden[:, :text], prefix[:, -text:].long()) if text else nats

    def _predicted_text(self) -> int:
        """The number of text tokens that the loss is on, too: in training with `text_weight`."""
        is_weighted = self.training and self.config.text_weight > 0
        return self.config.caption_length if is_weighted else 0

    def _text_loss(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What a loss on text (B, L) adds to each loss: 0, with the gradient of that on the text.

        So the loss of the indices stays what it is. It is predicted by the embeddings of the text.
        """
        logits = F.linear(hidden, self.caption_embedding.weight).flatten(0, 1).float()
        pad = self.config.caption_vocabulary_size
        loss = F.cross_entropy(logits, tokens.flatten(), reduction="sum", ignore_index=pad)
        return self.config.text_weight / tokens.numel() * (loss - loss.detach())

    def training_inputs(self, prefix: Tensor, grids: Tensor, progress: float) -> list[Tensor]:
        """Those of `loss` at a fraction of the training: with less conditioning, in random orders.

        Random numbers are those of the default generator, whose state checkpoints hold.
        """
        inputs = [self.config.drop_conditioning(prefix), grids]
        if self.config.order_anneal is not None:
            probability = random_order_probability(self.config.order_anneal, progress)
            inputs.append(sample_permutations(grids, probability))
        return inputs

    def linear_maps(self) -> dict[nn.Parameter, list[int]]:
        """The matrices of the blocks, each with the rows of the linear maps that it stacks."""
        maps: dict[nn.Parameter, list[int]] = {}
        for block in self.blocks:
            attention, feed_forward = block.attention, block.feed_forward
            maps[attention.qkv.weight] = [x * attention.head_dim for x in attention.heads]
            maps[feed_forward.gate_and_value.weight] = [self.config.hidden_dim] * 2
            maps[attention.out.weight] = maps[feed_forward.out.weight] = [self.config.dim]
        return maps

    def grid_positions(
        self, size: tuple[int, int], extension: PositionExtension = PositionExtension.SLIDE
    ) -> GridPositions:
        """Positions of a grid of `size`; a ValueError where this GPT has none."""
        scale = self.config.position_scale
        grid = GridPositions(size, self.grid.size, self.config.depth, extension, scale)
        if size != grid.trained and self.config.condition_latent_dim is not None:
            raise ValueError(f"with conditions, grids must be {grid.trained}, got {size}")
        return grid

    def make_cache(
        self,
        batch_size: int,
        size: tuple[int, int] | None = None,
        extension: PositionExtension = PositionExtension.SLIDE,
    ) -> KVCache:
        """An empty cache for grids of `size`, see `grid_positions`; default: the trained size."""
        grid = self.grid_positions(size or self.grid.size, extension)
        return KVCache(self.config, batch_size, grid, self.head.weight)

    def pretrained_config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"model": "GPT", "format_version": FORMAT_VERSION, **asdict(self.config)}

    def pretrained_state(self) -> dict[str, Tensor]:
        """The content of model.safetensors: low-rank updates are added to their matrices."""
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, LoRALinear):
                up, down = state.pop(f"{name}.up"), state.pop(f"{name}.down")
                state[f"{name}.weight"] = state[f"{name}.weight"] + up @ down
        return state

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder: config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.contiguous() for name, x in self.pretrained_state().items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        config = json.dumps(self.pretrained_config(), indent=2)
        (folder / "config.json").write_text(config + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """The model of a local model folder, in eval mode; an OSError or a ValueError."""
        path, weights = Path(folder, "config.json"), Path(folder, "model.safetensors")
        try:
            config = GPTConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        try:
            tensors = safetensors.torch.load_file(weights)
            with torch.device("meta"):  # a config may describe a network of any size
                cls(config).load_state_dict(tensors, assign=True)
            model = cls(config)
            model.load_state_dict(tensors)
        except (safetensors.SafetensorError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{weights} does not fit {path.name}: {error}") from error
        return model.eval().to(device)

    def _rotary(self, grid: GridPositions, positions: Tensor, begins: bool) -> Rotary:
        """cos and sin of positions (T, 3) or (B, T, 3), with those of the prefix if any.

        The class is at (0, 0), not rotated; the condition is laid over the grid; embeddings and
        caption are a line above it, at (0, 1), (0, 2), ...
        """
        config, coordinates = self.config, grid.coordinates(positions)
        if begins:
            length = self.prefix_length - math.prod(config.condition_latent_dim or (0,))
            line = torch.arange(length, device=positions.device)[:, None]
            prefix = F.pad(line.to(coordinates), (1, 0))
            if config.condition_latent_dim is not None:
                condition = grid.aligned_positions(config.condition_latent_dim, positions.device)
                prefix = torch.cat([prefix[:1], condition, prefix[1:]])
            prefix = prefix.expand(*coordinates.shape[:-2], -1, -1)
            coordinates = torch.cat([prefix, coordinates], dim=-2)
        cos, sin = rotary_cos_sin(coordinates, config.dim // config.num_heads, config.rope_base)
        if begins and config.blank_prefix:
            cos = F.pad(cos[..., 1:, :], (0, 0, 1, 0))
        return (cos, sin) if positions.dim() == 2 else (cos[:, None], sin[:, None])

    def _attention(
        self, grid: GridPositions, positions: Tensor, cache: KVCache | None, begins: bool
    ) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """Attention of each layer, called with its number, q, k and v."""
        if not begins:
            if cache is None:
                raise ValueError("without a prefix, tokens need the cache")
            numbers = grid.numbers(positions)
            if positions.dim() == 3:  # in any order
                numbers = cache.numbers(positions.shape[1])
            return cache.attention(numbers)
        if grid.slides and positions.shape[-2]:
            raise ValueError("larger grids with sliding positions are sampled token by token")
        count, width = positions.shape[-2] // grid.depth, grid.size[1]
        window = self.config.window_size
        shape = {
            "grid": (count, 1) if count % width and not window else (count // width, width),
            "window": window,
            "prefix": self.prefix_length,
            "depth": grid.depth,
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                cache.write_first(layer, k, v)
            groups = q.shape[1] // k.shape[1]
            if groups > 1:
                k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            return self.attend(q, k, v, **shape)

        return attend
