"""Device, precision, and the processes that torchrun starts."""

import inspect
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from utils.cli import UserError
from utils.training.randomness import seed_all


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: the device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise UserError(f"--device {name} is not available here; there is: {there}")
    return torch.device(name)


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; one alone without it."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def print(self, line: object) -> None:
        """Print a line once, above a progress bar if there is one."""
        if self.first:
            tqdm.write(str(line), file=sys.stdout)

    def fail(self, line: str) -> NoReturn:
        """End the training for a reason that all processes know of, and one of them says.

        Raises:
            UserError: in the first process.
            SystemExit: in the others.
        """
        if self.first:
            raise UserError(line)
        sys.exit(2)

    def bar(self, total: int, initial: int) -> tqdm:
        """A progress bar of training steps: of the first process, on a terminal."""
        return tqdm(
            total=total,
            initial=initial,
            unit=" steps",
            disable=None if self.first else True,
            leave=False,
        )

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a batch of rows."""
        return rows[self.rank :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """The `values` of each process, which are of one shape, on the CPU."""
        if self.count == 1:
            return [values]
        values = values.to(self.device)
        everywhere = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(everywhere, values)
        return [one.cpu() for one in everywhere]

    def largest(self, value: int) -> int:
        """The largest value of any process."""
        if self.count == 1:
            return value
        everywhere = torch.tensor(value, device=self.device)
        dist.all_reduce(everywhere, dist.ReduceOp.MAX)
        return int(everywhere)

    def leave(self) -> None:
        """Part from the other processes in good order, at the end; all of them do.

        Not after an error: the others may be waiting for this process elsewhere.
        """
        if self.count > 1:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over all processes."""
        if self.count == 1:
            return model
        parallel = nn.parallel.DistributedDataParallel
        # The codebook's statistics are those of all processes already. Newer versions of PyTorch
        # have another name for it.
        names = inspect.signature(parallel).parameters
        name = next(x for x in ("forward_sync_buffers", "broadcast_buffers") if x in names)
        return parallel(model, **{name: False})


def join_processes(device: str, seed: int) -> Processes:
    """Join the other processes of torchrun, if there are any, and seed the random numbers.

    Each process draws its own random numbers, but all build the same model with the first ones:
    parameters are made before `Processes.wrap`, which copies those of the first process.
    """
    picked, count, rank = pick_device(device), int(os.environ.get("WORLD_SIZE", 1)), 0
    if count > 1:
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(picked)
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
        rank = dist.get_rank()
    seed_all(seed + rank)
    return Processes(rank, count, picked)


def pick_precision(name: str, device: torch.device, *, on_cpu: str) -> str:
    """`auto` is bf16 on a GPU that has it, and `on_cpu` on a CPU, where it depends on the model."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return on_cpu if device.type == "cpu" and has_bf16 else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which a model runs in `precision`, fp32 or bf16."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
