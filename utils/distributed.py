"""Device, precision, and the processes that torchrun starts."""

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from utils.cli import UserError

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products, by precision
SKELETON = "_skeleton"  # attribute of a sharded model: the same without hooks and weights


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

    def on_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process, which alone calls it, for all."""
        return self.all_gather(make() if self.is_main else None)[0]

    def shard(self, rows: Tensor) -> Tensor:
        """This process's part of a batch of rows."""
        return rows[self.rank :: self.world_size]

    def block(self, count: int, batch_size: int) -> slice:
        """This process's part of `count` rows, which follow each other; see `join`.

        Where there is a batch for each process, they are the batches of a single process, so that
        results are the same to the last bit. A UserError for fewer rows than processes.
        """
        size = self.batch_size(count, batch_size)
        batches = -(-count // size)
        first, last = (batches * n // self.world_size * size for n in (self.rank, self.rank + 1))
        return slice(first, min(last, count))

    def batch_size(self, count: int, batch_size: int) -> int:
        """The rows at once: `batch_size`, or fewer so that each process has some of `count`."""
        if count < self.world_size:
            raise UserError(
                f"{count} images are too few for {self.world_size} processes; start fewer"
            )
        while -(-count // batch_size) < self.world_size:
            batch_size = max(1, batch_size // 2)
        return batch_size

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes in the order of their ranks, on the CPU."""
        return rows if self.world_size == 1 else torch.cat(self.all_gather(rows.cpu()))

    def merge(self, values: Tensor) -> None:
        """Fill in, in place, what other processes have set in `values`; each leaves the rest 0."""
        if self.world_size > 1:
            merged = values.contiguous().view(torch.uint8).to(self.device, copy=True)
            dist.all_reduce(merged)
            values.copy_(merged.cpu().view(values.dtype))

    def copy_from_main(self, model: nn.Module) -> None:
        """Give a model the weights that it has in the main process."""
        if self.world_size > 1:
            for value in model.state_dict().values():
                on_device = value.to(self.device)
                dist.broadcast(on_device, 0)
                value.copy_(on_device)

    def fully_shard(self, model: nn.Module, blocks: Iterable[nn.Module], precision: str) -> None:
        """Shard a model over the processes: FSDP2 (arXiv 2304.11277) of each block, then the rest.

        Of weights, gradients and optimizer states, each process has its rows. The blocks are
        gathered one by one, in the `precision` of matrix products. A model on the CPU comes to the
        device block by block. Make optimizers and resume after this.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* view")  # nothing is in-place
        if not dist.is_initialized():  # without torchrun
            make_store: Any = dist.HashStore  # type: ignore[attr-defined]
            dist.init_process_group(store=make_store(), rank=0, world_size=1)
        self.copy_from_main(model)
        empty = {id(x): nn.Parameter(x.detach().to("meta")) for x in model.parameters()}
        vars(model)[SKELETON] = copy.deepcopy(model, empty)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        dtype = DTYPES.get(precision)  # the states between blocks stay as they are
        policy = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=False)
        shards = [fully_shard(block, mesh=mesh, mp_policy=policy) for block in blocks]
        for shard in (*shards, fully_shard(model, mesh=mesh)):
            if self.device.type == "cpu":  # gloo sums, but takes no means
                shard.set_force_sum_reduction_for_comms(True)

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

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each process, of any type; tensors are on the CPU."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def shutdown(self) -> None:
        """Leave the process group at the end; after an error others may wait for this process."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes."""
        if self.world_size == 1 or SKELETON in vars(model):
            return model
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.broadcast_buffers = False  # codebook statistics are reduced by the quantizers
        return parallel


ALONE = Distributed(0, 1, torch.device("cpu"))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor in whole; all processes call this for one that is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """A whole tensor in the type and sharding of another of its shape."""
    from torch.distributed.tensor import distribute_tensor

    mesh, whole = like.device_mesh, whole.to(like.device, like.dtype)
    return distribute_tensor(whole, mesh, like.placements, src_data_rank=None)


def copy_model(model: Model) -> Model:
    """A copy of a model, sharded as it is, to hold weights: only in `whole` it can run."""
    skeleton = vars(model).get(SKELETON)
    if skeleton is None:
        return copy.deepcopy(model)
    result = copy.deepcopy(skeleton)
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    result.load_state_dict(tensors, assign=True)
    vars(result)[SKELETON] = skeleton
    return result


@contextmanager
def whole(model: Model) -> Iterator[Model]:
    """A model with whole weights on the device, for what processes do apart; all enter this."""
    skeleton = vars(model).get(SKELETON)
    if skeleton is None:
        yield model
        return
    tensors = {name: full_tensor(x) for name, x in model.state_dict().items()}
    skeleton.load_state_dict(tensors, assign=True)
    try:
        yield skeleton
    finally:
        skeleton.to("meta")


def init_distributed(device: str, seed: int) -> Distributed:
    """Join the other processes of torchrun, if there are any; seed PyTorch by seed + rank.

    Parameters are made before `Distributed.wrap`, which copies those of the main process.
    """
    picked, world_size, rank = pick_device(device), int(os.environ.get("WORLD_SIZE", 1)), 0
    if world_size > 1:
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(picked)
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
        rank = dist.get_rank()
    torch.manual_seed(seed + rank)
    return Distributed(rank, world_size, picked)


def is_first_to_fail() -> bool:
    """Whether no other process of this torchrun has called this before, on any machine."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    address, limit = os.environ["MASTER_ADDR"], timedelta(seconds=5)
    try:
        make: Any = dist.TCPStore  # type: ignore[attr-defined]
        store = make(address, int(os.environ["MASTER_PORT"]), timeout=limit)
        return store.add(f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # torchrun itself has gone
        return True


def pick_precision(name: str, device: torch.device, *, on_cpu: str) -> str:
    """`auto` is bf16 on a GPU with bfloat16, and `on_cpu` on a CPU with it; else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return on_cpu if device.type == "cpu" and has_bf16 else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model runs in `precision`: fp32, bf16 or fp16."""
    return torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES)
