"""State dicts in files of torch.save, which are zipped pickles: read without running any code."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.cli import UserError, one_line
from utils.files import check_size

CHECKPOINT_BYTES = 64 << 30
NESTS = ("state_dict", "model", "module", "ema")  # keys under which projects store it
MAX_NESTING = 3


class StateDict(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        tensors: by name.
        nest: the keys, joined by dots, under which they were; "": at the top.
        beside: other keys of state dicts, which were not read.
        ignored: names between the tensors whose values are not tensors.
    """

    tensors: dict[str, Tensor]
    nest: str
    beside: list[str]
    ignored: list[str]


def read_state_dict(path: str | Path, nests: Sequence[str] = NESTS) -> StateDict:
    """The plain tensors of a .ckpt, .pt, .pth or .bin file.

    Args:
        path: the file.
        nests: keys under which they may be; the first that occurs is read.

    Raises:
        UserError: no such file; one that holds other objects, or no tensors; one that would take
            more memory than its size.
    """
    path = Path(path)
    try:
        check_size(path, CHECKPOINT_BYTES)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.save does not compress
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path} is a compressed archive, not a file of torch.save")
        with warnings.catch_warnings(action="ignore"):  # of unusual pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # unpickling raises errors of many types
        if type(error).__name__ != "UnpicklingError":
            raise UserError(f"cannot read {path}: {one_line(error)}") from error
        raise UserError(
            f"{path} holds Python objects besides its tensors, or is damaged. Reading such objects "
            "can run any code of whoever made the file, so they are never read here; ask for a "
            "file of the tensors alone (.safetensors), or see docs/pretrained.md for a way if you "
            "trust its maker"
        ) from error
    taken: list[str] = []
    beside: list[str] = []
    for _ in range(MAX_NESTING):
        inner = content if isinstance(content, dict) else {}
        found = [nest for nest in nests if isinstance(inner.get(nest), dict) and inner[nest]]
        if not found:
            break
        content = inner[found[0]]
        beside += [".".join([*taken, nest]) for nest in found[1:]]
        taken.append(found[0])
    items = content.items() if isinstance(content, dict) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no state dict; give the file of the trained model")
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise UserError(f"{path}: {name:.80} is not a plain tensor with its own memory")
    ignored = [str(key) for key, _ in items if str(key) not in tensors]
    return StateDict(tensors, ".".join(taken), beside, ignored)


def _is_plain(tensor: Tensor) -> bool:
    """Whether each element has memory of its own: one byte can be expanded to a terabyte."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
