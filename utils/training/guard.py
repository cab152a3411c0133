"""The step of the optimisers, and before it the guard against numbers that are not finite."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.cli import first_few
from utils.distributed import Distributed
from utils.training import optimizers
from utils.training.resume import Progress
from utils.training.schedule import TrainingConfig

ROWS_SHOWN = 64


class Guard:
    """Takes each step of a training, if its losses and gradients are finite in every process."""

    def __init__(
        self,
        group: Distributed,
        progress: Progress,
        config: TrainingConfig,
        name: Callable[[int], str],
        *,
        changing: Sequence[nn.Module | None] = (),
    ) -> None:
        """Set the terms.

        Args:
            group: the processes, which agree on every step.
            progress: counts what was skipped.
            config: how to clip, and whether to skip or to stop.
            name: what to call a row in a complaint.
            changing: modules that a forward pass changes already, as a codebook of averages;
                they are put back when a batch is skipped.
        """
        self._group, self._progress = group, progress
        self._name, self._max_grad_norm = name, config.max_grad_norm
        self._skip, self._limit = config.on_nonfinite == "skip", config.nonfinite_limit
        self._changing = [module for module in changing if module is not None]
        self._before: list[dict[str, Tensor]] = []

    def remember(self) -> None:
        """To be called before each forward pass."""
        if self._skip:
            self._before = [
                {name: value.clone() for name, value in module.state_dict().items()}
                for module in self._changing
            ]

    def step(
        self,
        by_name: Mapping[str, Optimizer],
        values: dict[str, Tensor],
        learning_rate: float,
        rows: Tensor,
    ) -> bool:
        """Clip the gradients, take a step, and clear them. Was it taken?

        Args:
            by_name: the optimisers by the name under which the norm of the gradient, before
                clipping, is put into `values`.
            values: losses and the like of this batch, single numbers.
            learning_rate: of this step.
            rows: numbers of the rows of this batch, in all processes, for the complaint.

        Raises:
            UserError: a number is not finite, and no (further) batch may be skipped. Nothing was
                stepped. Of several processes the first says so.
        """
        for name, optimizer in by_name.items():
            values[name] = optimizers.clip(optimizer, self._max_grad_norm)
        numbers = torch.stack(
            [torch.as_tensor(x, device=self._group.device).float() for x in values.values()]
        )
        bad = self._group.all_reduce_max(int(not torch.isfinite(numbers).all()))
        if bad:
            everywhere = torch.stack(self._group.all_gather(numbers)).T.tolist()
            self._refuse(dict(zip(values, everywhere, strict=True)), learning_rate, rows)
        for optimizer in by_name.values():
            if bad:
                optimizer.zero_grad(set_to_none=True)
            else:
                optimizers.step(optimizer, learning_rate)
        return not bad

    def _refuse(
        self, values: Mapping[str, list[float]], learning_rate: float, rows: Tensor
    ) -> None:
        """Leave a batch out, or stop: `values` are those of all processes by name."""
        progress = self._progress
        odd = {name: [x for x in each if not math.isfinite(x)] for name, each in values.items()}
        line = (
            f"step {progress.step}: {', '.join(f'{name} {x[0]}' for name, x in odd.items() if x)} "
            f"at learning rate {learning_rate:.2g}, in "
            f"{first_few([self._name(row) for row in rows.tolist()], limit=ROWS_SHOWN)}"
        )
        if not self._skip:
            self._group.fail(
                f"{line}; lower --learning_rate, use --precision fp32 or --on_nonfinite skip, then "
                "--resume"
            )
        progress.skipped += 1
        if progress.skipped > self._limit:
            self._group.fail(
                f"{line}; {self._limit} batches were left out before (--nonfinite_limit): lower "
                "--learning_rate or use --precision fp32, then --resume"
            )
        self._group.print(f"warning: {line}; left out, {progress.skipped} of {self._limit}")
        for module, state in zip(self._changing, self._before, strict=True):
            module.load_state_dict(state)
