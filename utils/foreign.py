"""State dicts in files of torch.save, which are zipped pickles: read without running anything."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.cli import UserError
from utils.files import check_size

CHECKPOINT_BYTES = 64 << 30
NESTS = ("state_dict", "model", "module", "ema")  # the keys under which projects put it
DEEPEST = 3


class StateDict(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        tensors: by name.
        nest: the key, or keys joined by a dot, under which they lay; "": none.
        beside: other keys under which there are state dicts, which were not read.
        ignored: names of what lies between the tensors and is none.
    """

    tensors: dict[str, Tensor]
    nest: str
    beside: list[str]
    ignored: list[str]


def read_state_dict(path: str | Path, nests: Sequence[str] = NESTS) -> StateDict:
    """The plain tensors of a .ckpt, .pt, .pth or .bin file.

    Args:
        path: the file.
        nests: the keys under which they may lie; of several that are there, the first counts.

    Raises:
        UserError: no such file; one that holds more than tensors, or none; one that would take
            more memory than it has bytes.
    """
    path = Path(path)
    try:
        check_size(path, CHECKPOINT_BYTES)
        _check_zip(path)
        with warnings.catch_warnings(action="ignore"):  # of odd pickles, in torch's own words
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # what unpickling refuses has many types
        line = " ".join(str(error).split())[:200]
        if type(error).__name__ != "UnpicklingError":
            raise UserError(f"cannot read {path}: {line}") from error
        raise UserError(
            f"{path} holds Python objects besides its tensors, or is damaged. Reading such objects "
            "can run any code of whoever made the file, so they are never read here; ask for a "
            "file of the tensors alone (.safetensors), or see docs/tokenizers.md for a way if you "
            "trust its maker"
        ) from error
    taken, beside = [], []
    # As deep as anybody nests; a stranger's may lie in itself.
    while len(taken) < DEEPEST and (there := _nests_in(content, nests)):
        content = content[there[0]]
        beside += [".".join([*taken, nest]) for nest in there[1:]]
        taken.append(there[0])
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict; give the file of the trained model")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise UserError(f"{path}: {name:.80} is no plain tensor in memory of its own")
    if not tensors:
        raise UserError(f"{path} holds no state dict; give the file of the trained model")
    ignored = [str(key) for key in content if str(key) not in tensors]
    return StateDict(tensors, ".".join(taken), beside, ignored)


def _nests_in(content: object, nests: Sequence[str]) -> list[str]:
    """Those of the keys under which there is something to read."""
    if not isinstance(content, dict):
        return []
    return [nest for nest in nests if isinstance(content.get(nest), dict) and content[nest]]


def _check_zip(path: Path) -> None:
    """Refuse a zip file that unpacks to more than it is: torch.save does not compress."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise UserError(f"{path} is a compressed archive and no file of torch.save")


def _is_plain(tensor: Tensor) -> bool:
    """Whether each element has its place in memory: one byte can be said to be a terabyte."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
