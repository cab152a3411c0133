"""One step of drawing: from the token before to the logits of the next, and an index of them."""

import torch
from torch import Tensor

from transformer import noise
from transformer.distribution import DEFAULT_PARAMS, NO_GUIDANCE, Guidance, SamplingParams, choose
from transformer.gpt import GPT
from transformer.positions import PositionExtension
from transformer.prefix import null_prefix


class Step:
    """Draws one batch of grids after the other, token by token, with one cache for all of them.

    Attributes:
        cache: keys and values of the batch; of both halves of a doubled one with guidance.
        batch_size: B, grids in a batch.
        count: tokens of a grid.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        *,
        size: tuple[int, int],
        position_extension: PositionExtension = PositionExtension.SLIDE,
        guidance: Guidance = NO_GUIDANCE,
        params: SamplingParams = DEFAULT_PARAMS,
    ) -> None:
        """Allocate the cache.

        Args:
            model: in eval mode.
            batch_size: grids in a batch.
            size: (h, w) of the grids.
            position_extension: positions in a grid that is larger than the trained one.
            guidance: two passes in one batch, with class and condition, and without.
            params: of the distributions that are drawn from.
        """
        self.model, self.guidance, self.params = model, guidance, params
        self.batch_size, self.count = batch_size, size[0] * size[1] * model.config.depth
        self.guided = guidance.scale != 1
        self.cache = model.make_cache(batch_size * (1 + self.guided), size, position_extension)

    def begin(self, keys: Tensor) -> None:
        """Begin a batch whose random numbers follow from `keys` (B,), see `noise.keys`."""
        self.cache.reset()
        self._keys = keys

    def __call__(
        self, tokens: Tensor, token: int, *, draws: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Take in the token before, and draw one.

        Args:
            tokens: (B,), the token before; before token 0 the whole prefix, (B,) or (B, p).
            token: number of the token that is drawn, counted from 0 behind the prefix.
            draws: whether one is needed.

        Returns:
            logits: (B, K), of the model that knows class and condition.
            drawn: (B,), int64, or None.
        """
        if self.guided:
            without = tokens if token else null_prefix(tokens, self.model.config)
            tokens = torch.cat([tokens, without])
        # The prefix, all at once, comes in at position 0.
        position = self.model.config.prefix_length + token - 1 if token else 0
        return self._choose(self.model.step(tokens, position, self.cache), token, draws)

    def prefill(
        self, prefix: Tensor, given: Tensor, *, draws: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The same for the prefix and given rows (B, r, w[, depth]), all in one pass."""
        token = given[0].numel()
        if self.guided:
            prefix = torch.cat([prefix, null_prefix(prefix, self.model.config)])
            given = torch.cat([given, given])
        return self._choose(self.model.prefill(prefix, given, self.cache), token, draws)

    def _choose(self, logits: Tensor, token: int, draws: bool) -> tuple[Tensor, Tensor | None]:
        drawn = None
        if draws:
            scale = self.guidance.at(token, self.count) if self.guided else None
            drawn = choose(logits, noise.uniform(self._keys, token), self.params, scale)
        return logits[: self.batch_size], drawn
