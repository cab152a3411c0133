"""Where the tokens of a sequence stand: the class, the condition, the cells and their depths."""

import torch
from torch import Tensor

from transformer.config import GPTConfig
from transformer.order import token_order
from transformer.positions import Places, PositionExtension


class Sequence:
    """The layout of a model's sequences: p tokens of prefix, then n = h*w*depth of the grid.

    Attributes:
        prefix: p, one class token and the cells of the condition.
        depth: tokens of a cell, one after the other.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.config, self.prefix, self.depth = config, config.prefix_length, config.depth

    def by_token(self, x: Tensor) -> Tensor:
        """Of the prefix and each cell (p + h*w, ...) -> of the prefix and each token (p + n, ...).

        Tokens of one cell are at the same place; their words say which depth they are of.
        """
        if self.depth == 1:
            return x
        prefix, cells = x.tensor_split([self.prefix])
        return torch.cat([prefix, cells.repeat_interleave(self.depth, dim=0)])

    def places(
        self, size: tuple[int, int], position_extension: PositionExtension = PositionExtension.SLIDE
    ) -> Places:
        """Where the cells of a grid of `size` are to the model.

        Raises:
            ValueError: another size than the trained one, with a condition, which covers that; or
                with embeddings of cells, which can only slide.
        """
        config = self.config
        if size != config.latent_dim and config.condition_latent_dim is not None:
            raise ValueError(
                f"a GPT with conditions takes grids of its own size {config.latent_dim}, got {size}"
            )
        if (
            size != config.latent_dim
            and config.has_absolute_positions
            and position_extension != PositionExtension.SLIDE
        ):
            raise ValueError(
                "learned positions (also those of order_anneal) can neither be extrapolated nor "
                "interpolated"
            )
        return Places(size, config.latent_dim, config.head_dim, position_extension)

    def turn(self, places: Places) -> tuple[Tensor, Tensor]:
        """cos and sin of all tokens, (p + n, head_dim / 2) each; the class is not turned.

        The condition lies over the grid, whatever its own size: one of its cells is turned as the
        grid's cell at the same place of the picture, so that the distance between them is 0.
        """
        cos, sin = places.cells(0, places.size[0])
        still = cos.new_full((1, cos.shape[1]), 0.0 if self.config.blank_prefix else 1.0)
        parts = [(still, torch.zeros_like(still)), (cos, sin)]
        if self.config.condition_latent_dim is not None:
            parts.insert(1, places.aligned_positions(self.config.condition_latent_dim))
        cos, sin = (torch.cat(angles) for angles in zip(*parts, strict=True))
        return self.by_token(cos), self.by_token(sin)

    def reorder(
        self, order: Tensor, x: Tensor, tokens: Tensor, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The same with the cells of each image in an order of its own.

        Args:
            order: (B, h*w), permutations of the cells.
            x: (B, p + n, dim).
            tokens: (B, n).
            turn: None, or cos and sin (p + n, head_dim / 2).

        Returns:
            x, tokens, and None or cos and sin (B, 1, p + n, head_dim / 2).

        Raises:
            ValueError: the model was not made for random orders.
        """
        if self.config.order_anneal is None:
            raise ValueError("only a GPT with order_anneal knows which cell comes next in an order")
        order = token_order(order, self.depth)
        before = torch.arange(self.prefix, device=order.device).expand(len(order), -1)
        whole = torch.cat([before, order + self.prefix], dim=1)  # (B, p + n)
        if turn is not None:
            turn = tuple(angle[whole][:, None] for angle in turn)
        return x.take_along_dim(whole[:, :, None], dim=1), tokens.gather(1, order), turn
