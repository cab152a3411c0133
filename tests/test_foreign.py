"""Checkpoints of strangers: tensors are found in any wrapper, and nothing is ever run."""

import argparse
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from utils.cli import UserError
from utils.foreign import StateDict, read_state_dict

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}


class Callback:
    """What Lightning puts beside the weights."""

    def __init__(self) -> None:
        self.best = 3


class Runs:
    """What a stranger may put there."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


def read(folder: Path, content: object, **options: object) -> StateDict:
    torch.save(content, folder / "a.ckpt", **options)
    return read_state_dict(folder / "a.ckpt", "a.weight")


WRAPPERS = ("", "state_dict.", "model.", "module._orig_mod.", "first_stage_model.module.", "vae.x.")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_in_any_wrapper(
    tmp_path: Path, wrapper: str, nested: bool, zipped: bool
) -> None:
    content: dict = STATE
    if nested:
        for key in reversed(wrapper.split(".")[:-1]):
            content = {key: content}
    else:
        content = {wrapper + name: tensor for name, tensor in STATE.items()}
    found = read(tmp_path, content | {"epoch": 3}, _use_new_zipfile_serialization=zipped)
    assert (found.wrapper, found.others, found.ignored) == (wrapper, [], ["epoch"])
    assert found.tensors.keys() == STATE.keys()
    assert all(torch.equal(found.tensors[name], STATE[name]) for name in STATE)


def test_safetensors_files_are_read_as_well(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in STATE.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    found = read_state_dict(tmp_path / "a.safetensors", "a.weight")
    assert (found.wrapper, found.tensors.keys()) == ("model.", STATE.keys())


def test_of_several_the_average_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    """Numbers between the tensors vanished without a word, and so did a second state dict."""
    other = {"module.a.weight": torch.zeros(1)}
    found = read(tmp_path, {"model": other, "ema": STATE | {"re_embed": 3}, "optimizer": {}})
    assert (found.wrapper, found.others, found.ignored) == (
        "ema.",
        ["model.module."],
        ["ema.re_embed"],
    )
    assert found.tensors.keys() == STATE.keys()
    both = {
        f"{name}_stage_model.{key}": x for name in ("cond", "first") for key, x in STATE.items()
    }
    found = read(tmp_path, {"state_dict": both})
    assert found.wrapper == "state_dict.first_stage_model."
    assert found.tensors.keys() == STATE.keys()


def test_dicts_within_themselves(tmp_path: Path) -> None:
    content: dict = {"a": 1}
    content |= {f"model{number}": content for number in range(50)}
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path, content)


def test_other_objects_beside_the_tensors_are_left_out(tmp_path: Path) -> None:
    """Lightning's callbacks, argparse's flags and numbers of numpy had the file refused."""
    found = read(
        tmp_path,
        {
            "state_dict": STATE,
            "callbacks": {Callback: Callback()},
            "args": argparse.Namespace(lr=0.1, path=Path("x")),
            "best": np.float64(3.0),
        },
    )
    assert found.tensors.keys() == STATE.keys()
    assert len(found.ignored) == 3


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "stranger",
    [
        Runs(exec, "open('canary', 'w')"),
        Runs(eval, "open('canary', 'w')"),
        Runs(os.system, "touch canary"),
        Runs(Path.touch, Path("canary")),
    ],
)
def test_objects_are_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stranger: Runs, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": STATE, "callbacks": stranger}
    with suppress(UserError):  # refused, or read without it
        found = read(tmp_path, content, _use_new_zipfile_serialization=zipped)
        assert found.tensors.keys() == STATE.keys()
    assert not Path("canary").exists()
    torch.load("a.ckpt", weights_only=False)  # the payload does what it is for
    assert Path("canary").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {}}])
def test_what_is_no_state_dict(tmp_path: Path, content: object) -> None:
    with pytest.raises(UserError, match="holds no state dict"):
        read(tmp_path, content)


def test_small_files_of_large_tensors(tmp_path: Path) -> None:
    """A byte that is said to be a terabyte would take that much as soon as it is converted."""
    with pytest.raises(UserError, match=r"a\.weight is not a plain tensor"):
        read(tmp_path, {"a.weight": torch.zeros(1).expand(1 << 20, 1 << 20)})
    read(tmp_path, {"a": torch.zeros(1 << 20)})
    with (
        zipfile.ZipFile(tmp_path / "a.ckpt") as old,
        zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.ckpt").stat().st_size < 20_000
    with pytest.raises(UserError, match="is a compressed archive"):
        read_state_dict(tmp_path / "b.ckpt", "a")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02]."])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt"):
        read_state_dict(tmp_path / "a.ckpt", "a")
    with pytest.raises(UserError, match="cannot read"):
        read_state_dict(tmp_path / "none.ckpt", "a")
