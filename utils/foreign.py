"""Tensors in checkpoints of other projects, in any wrapper, read without running any code."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.cli import UserError, one_line
from utils.files import check_size, read_tensors

CHECKPOINT_BYTES = 64 << 30
PREFERRED = ("ema", "first_stage_model")  # of several state dicts, in this order


class StateDict(NamedTuple):
    """A state dict in a checkpoint."""

    tensors: dict[str, Tensor]  # by name, without the wrapper
    wrapper: str  # what stood before their names: keys of outer dicts and modules, joined by dots
    others: list[str]  # wrappers of other state dicts of the same kind, which were not read
    ignored: list[str]  # everything else in the checkpoint, by its name there


def read_state_dict(path: str | Path, marker: str) -> StateDict:
    """The state dict in a checkpoint (torch.save or safetensors) that holds the name `marker`.

    It may lie within other dicts and below prefixes such as `module.` and `_orig_mod.`. Averaged
    weights (`ema`) are preferred. Without the marker, all tensors are returned.

    A UserError for a file that cannot be read, holds no tensors, or would take more memory than
    its size.
    """
    path = Path(path)
    items = _read(path)
    if not any(isinstance(value, Tensor) for value in items.values()):
        raise UserError(f"{path} holds no state dict; give the file of the trained model")
    found = (name for name in items if f".{name}".endswith(f".{marker}"))
    ranked = sorted(
        (name.removesuffix(marker) for name in found),
        key=lambda x: (*(name not in x for name in PREFERRED), len(x), x),
    )
    wrapper, *others = ranked or [""]
    apart = tuple(x for x in others if x and not wrapper.startswith(x))
    tensors = {
        name.removeprefix(wrapper): value
        for name, value in items.items()
        if isinstance(value, Tensor) and name.startswith(wrapper) and not name.startswith(apart)
    }
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise UserError(f"{path}: {name:.80} is not a plain tensor with its own memory")
    read = {wrapper + name for name in tensors}
    ignored = [name for name in items if name not in read and not name.startswith(apart)]
    return StateDict(tensors, wrapper, others, ignored)


def _flatten(content: Any, name: str = "") -> dict[str, Any]:
    """All values in nested dicts, by their keys joined with dots."""
    if not isinstance(content, Mapping):
        return {name: content}
    start = f"{name}." if name else ""
    parts = (_flatten(value, f"{start}{key}") for key, value in content.items())
    return {key: value for part in parts for key, value in part.items()}


class _Placeholder:
    """Stands for every object of a checkpoint that is not a tensor; nothing of it is run."""

    def __init__(self, *_: Any) -> None: ...

    __setstate__ = __init__


def _read(path: Path) -> dict[str, Any]:
    """All values of a checkpoint, see `_flatten`."""
    if path.suffix == ".safetensors":
        return dict(read_tensors(path))
    try:
        check_size(path, CHECKPOINT_BYTES)
        names: list[str] = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.save does not compress
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path} is a compressed archive, not a file of torch.save")
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # A class for each name: what a checkpoint calls is compared with them one by one.
        placeholders: Any = [(type("Placeholder", (_Placeholder,), {}), name) for name in names]
        with (
            warnings.catch_warnings(action="ignore"),  # of unusual pickles
            torch.serialization.safe_globals(placeholders),
        ):
            return _flatten(torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # unpickling raises errors of many types
        if type(error).__name__ != "UnpicklingError":
            raise UserError(f"cannot read {path}: {one_line(error)}") from error
        raise UserError(
            f"{path} holds objects that are never read here, as reading them can run any code of "
            "whoever made the file, or is damaged; ask for a file of the tensors alone "
            "(.safetensors)"
        ) from error


def _is_plain(tensor: Tensor) -> bool:
    """Whether each element has memory of its own: one byte can be expanded to a terabyte."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
