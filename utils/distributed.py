"""Device, precision, and the processes that torchrun starts."""

import inspect
import os
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from utils.cli import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU; a UserError for one that is not available."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    names = ["cuda"] * has_cuda + ["mps"] * has_mps + ["cpu"]
    if name not in ("auto", *names):
        raise UserError(f"--device {name} is not available here; there is: {', '.join(names)}")
    return torch.device(names[0] if name == "auto" else name)


@dataclass(frozen=True)
class Distributed:
    """This process among the `world_size` processes of torchrun; without torchrun the only one."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def print(self, line: object) -> None:
        """Print a line once, above a progress bar if there is one."""
        if self.is_main:
            tqdm.write(str(line), file=sys.stdout)

    def fail(self, message: str) -> NoReturn:
        """End a training for a reason that all processes have found; the main one reports it."""
        if self.is_main:
            raise UserError(message)
        sys.exit(2)

    def shard(self, rows: Tensor) -> Tensor:
        """This process's part of a batch of rows."""
        return rows[self.rank :: self.world_size]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """The largest value of any process."""
        if self.world_size == 1:
            return value
        result = torch.tensor(value, device=self.device)
        dist.all_reduce(result, dist.ReduceOp.MAX)
        return int(result)

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The `values` of each process, all of one shape, on the CPU."""
        if self.world_size == 1:
            return [values]
        values = values.to(self.device)
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(gathered, values)
        return [one.cpu() for one in gathered]

    def shutdown(self) -> None:
        """Leave the process group at the end; after an error others may wait for this process."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes."""
        if self.world_size == 1:
            return model
        parallel = nn.parallel.DistributedDataParallel
        # Codebook statistics are reduced by the quantizers. PyTorch renamed the argument.
        is_new = "forward_sync_buffers" in inspect.signature(parallel).parameters
        name = "forward_sync_buffers" if is_new else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        return parallel(model, **options)


def init_distributed(device: str, seed: int) -> Distributed:
    """Join the other processes of torchrun, if there are any; seed all libraries by seed + rank.

    Parameters are made before `Distributed.wrap`, which copies those of the main process.
    """
    picked, world_size, rank = pick_device(device), int(os.environ.get("WORLD_SIZE", 1)), 0
    if world_size > 1:
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(picked)
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
        rank = dist.get_rank()
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    return Distributed(rank, world_size, picked)


def pick_precision(name: str, device: torch.device, *, on_cpu: str) -> str:
    """`auto` is bf16 on a GPU with bfloat16, and `on_cpu` on a CPU with it; else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return on_cpu if device.type == "cpu" and has_bf16 else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which a model runs in `precision`: fp32, bf16 or fp16."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype)
