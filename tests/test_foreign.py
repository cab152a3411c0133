"""Files of torch.save by strangers: tensors are read, and nothing is ever run."""

import re
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from utils.cli import UserError
from utils.foreign import read_state_dict

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}


class Callback:
    """What Lightning puts beside the weights."""


class Runs:
    """What a stranger may put there."""

    def __reduce__(self) -> tuple:
        return exec, ("import pathlib; pathlib.Path('canary').touch()",)


def saved(folder: Path, content: object, **options: object) -> Path:
    torch.save(content, folder / "a.ckpt", **options)
    return folder / "a.ckpt"


@pytest.mark.parametrize("nest", ["state_dict", "model", "module", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_wherever_they_lie(tmp_path: Path, nest: str, zipped: bool) -> None:
    content = {nest: STATE, "epoch": 3} if nest else STATE
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    found = read_state_dict(path)
    assert found.nest == nest
    assert found.tensors.keys() == STATE.keys()
    assert all(torch.equal(found.tensors[name], STATE[name]) for name in STATE)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    """Numbers between the tensors vanished without a word, and so did a second state dict."""
    other = {"a.weight": torch.zeros(1)}
    path = saved(tmp_path, {"model": STATE | {"re_embed": 3}, "ema": other, "optimizer": {}})
    found = read_state_dict(path)
    assert (found.nest, found.beside, found.ignored) == ("model", ["ema"], ["re_embed"])
    found = read_state_dict(path, ("ema", "model"))
    assert (found.nest, found.beside, found.ignored) == ("ema", ["model"], [])
    assert found.tensors.keys() == other.keys()


def test_a_dict_within_itself(tmp_path: Path) -> None:
    content: dict = {"a": 1}
    content["model"] = content
    with pytest.raises(UserError, match="holds no state dict"):
        read_state_dict(saved(tmp_path, content))


@pytest.mark.parametrize("stranger", [Callback(), Runs()])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_refused_and_not_run(tmp_path: Path, stranger: object, zipped: bool) -> None:
    """The message quoted a command that runs them, without a warning."""
    content = {"state_dict": STATE, "callbacks": stranger}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"can run any code .* never read here") as caught:
        read_state_dict(path)
    assert "weights_only=False" not in str(caught.value)
    assert not Path("canary").exists()


@pytest.mark.parametrize("nest", ["ema", "state_dict", "model", ""])
def test_the_documented_way_makes_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nest: str
) -> None:
    """It knew of state_dict alone."""
    monkeypatch.chdir(tmp_path)
    stranger = {"callbacks": Callback()}
    torch.save({nest: STATE, **stranger} if nest else STATE | stranger, "IN")
    with pytest.raises(UserError, match="never read here"):
        read_state_dict("IN")
    page = (ROOT / "docs" / "pretrained.md").read_text()
    exec(re.search(r'python -c "(import torch.*OUT.*)"', page)[1], {})
    found = read_state_dict("OUT")
    assert found.tensors.keys() == STATE.keys()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {}}, STATE["a.weight"]])
def test_what_is_no_state_dict(tmp_path: Path, content: object) -> None:
    with pytest.raises(UserError, match="holds no state dict"):
        read_state_dict(saved(tmp_path, content))


def test_small_files_of_large_tensors(tmp_path: Path) -> None:
    """A byte that is said to be a terabyte would take that much as soon as it is converted."""
    huge = {"a": torch.zeros(1).expand(1 << 20, 1 << 20)}
    with pytest.raises(UserError, match="a is not a plain tensor"):
        read_state_dict(saved(tmp_path, huge))
    plain = saved(tmp_path, {"a": torch.zeros(1 << 20)})
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.ckpt").stat().st_size < 20_000
    with pytest.raises(UserError, match="is a compressed archive"):
        read_state_dict(tmp_path / "b.ckpt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02]."])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt"):
        read_state_dict(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="cannot read"):
        read_state_dict(tmp_path / "none.ckpt")
