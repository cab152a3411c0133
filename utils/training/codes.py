"""Codes that fall out of use: the warning, and what --reset_codebook_on_collapse does about it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.distributed import Distributed

LOW_USAGE = 20  # percent
ENOUGH = 4  # indices for each code, to tell how many are in use
MOST_RESCUES = 3


@dataclass
class Rescues:
    """How often the codes were let start anew."""

    done: int = 0


class CodeWatch:
    """Counts the codes that a training chooses, and looks at its evaluations how many they are.

    Attributes:
        seen: (num_codes,), how often this process chose each since there last were enough to judge.
        rescues: so far; like `seen` a part of what a resumed training goes on with.
    """

    def __init__(
        self, num_codes: int, cure: str, rescue: Callable[[], object] | None, group: Distributed
    ) -> None:
        """Begin to count.

        Args:
            num_codes: of the codebook.
            cure: what a user can do, for the warning.
            rescue: lets all codes start anew; None: only warn.
            group: all processes, whose counts are taken together.
        """
        self._cure, self._rescue, self._group = cure, rescue, group
        self.seen = torch.zeros(num_codes, device=group.device)
        self.rescues = Rescues()

    def look(self, *, ends: bool) -> None:
        """Warn where few codes are in use, and rescue them unless the training ends here."""
        usage = share_in_use(self._group.all_reduce_sum(self.seen.clone()))
        if usage is None:
            return
        self.seen.zero_()
        if usage >= LOW_USAGE:
            return
        self._group.print(
            f"warning: only {usage:.1f} % of the codes are in use, so that the images will lack "
            f"detail; {self._cure}"
        )
        if self._rescue is not None and not ends and self.rescues.done < MOST_RESCUES:
            self._rescue()
            self.rescues.done += 1
            self._group.print(
                f"codebook rescue {self.rescues.done} of {MOST_RESCUES}: all codes start anew from "
                "the next batch"
            )


def share_in_use(seen: Tensor) -> float | None:
    """Percent of codes that occur in `seen`, how often each was chosen; None: too few to tell."""
    if seen.sum() < ENOUGH * len(seen):
        return None
    return 100 * float((seen > 0).float().mean())
