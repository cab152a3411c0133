"""Model folders: whole or not at all, verified when read, of the right kind, without pickle."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.cli import UserError
from utils.files import read_json, read_tensors, write_folder
from utils.provenance import Provenance, Stage, find_model_folder, load_model, model_files


@dataclass(frozen=True)
class NetConfig:
    width: int = 3


class Net(nn.Module):
    """Weights that are tied, a view, half precision, a scalar, and channels_last."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(config.width, config.width)
        self.tied = nn.Linear(config.width, config.width)
        self.tied.weight = self.first.weight
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.register_buffer("low", torch.randn(4, dtype=torch.bfloat16))
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("turned", torch.randn(4, 4).T)

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        return self.state_dict()

    def pretrained_config(self) -> dict[str, Any]:
        return asdict(self.config)

    @classmethod
    def from_pretrained(cls, folder: Path, device: str) -> "Net":
        net = cls(NetConfig(**json.loads((folder / "config.json").read_text())))
        net.load_state_dict(read_tensors(folder / "model.safetensors"))
        return net.eval().to(device)


PROVENANCE = Provenance("run", 5, 0.2, (Stage("gpt", "python train.py", {"indices": "ab"}),))


def saved(folder: Path, seed: int = 0, width: int = 3) -> Net:
    torch.manual_seed(seed)
    net = Net(NetConfig(width))
    write_folder(folder, model_files(net, PROVENANCE))
    return net


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


def test_round_trip(tmp_path: Path) -> None:
    net = saved(tmp_path / "deep" / "best", width=5)
    for path in (tmp_path / "deep" / "best", str(tmp_path / "deep")):
        loaded = load_model(path, Net)
        assert same(loaded.model.state_dict(), net.state_dict())
        assert loaded.model.config == NetConfig(5)
        assert not loaded.model.training
        assert loaded.provenance == PROVENANCE
        assert loaded.folder == tmp_path / "deep" / "best"
    again = saved(tmp_path / "again", width=5)
    assert load_model(tmp_path / "again", Net).sha256 == loaded.sha256
    assert same(again.state_dict(), net.state_dict())
    saved(tmp_path / "again", seed=1)
    assert load_model(tmp_path / "again", Net).sha256 != loaded.sha256


def test_it_works_beside_the_folder_it_came_from(tmp_path: Path) -> None:
    saved(tmp_path / "outputs" / "run" / "best")
    (tmp_path / "outputs" / "run" / "config.json").write_text("{}")
    saved(tmp_path / "elsewhere")
    assert load_model(tmp_path / "outputs" / "run", Net).home == (tmp_path / "outputs" / "run")
    assert load_model(tmp_path / "elsewhere", Net).home == Path("outputs/run")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such model folder: .*none"):
        find_model_folder(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a model folder: it has no config\.json and model"):
        find_model_folder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    """safetensors does not notice; and a digit of config.json may be another model."""
    saved(tmp_path / "net")
    file = tmp_path / "net" / name
    content = bytearray(file.read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        content[position] ^= 4
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is damaged: its SHA-256"):
            load_model(tmp_path / "net", Net)
        content[position] ^= 4
    file.write_bytes(content)
    load_model(tmp_path / "net", Net)


def test_without_checksums_damage_is_still_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "net")
    (tmp_path / "net" / "sha256.json").unlink()
    file = tmp_path / "net" / "model.safetensors"
    good = file.read_bytes()
    for bad in (b"", good[:5], good[:-1], b"x" * 100):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
            load_model(tmp_path / "net", Net)


def test_what_the_model_refuses_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "net")
    (tmp_path / "net" / "sha256.json").unlink()
    (tmp_path / "net" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*net: "):
        load_model(tmp_path / "net", Net)


def test_whoever_changed_a_file_on_purpose_is_told_how(tmp_path: Path) -> None:
    saved(tmp_path / "net")
    with (tmp_path / "net" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"remove its line from sha256\.json"):
        load_model(tmp_path / "net", Net)
    sums = json.loads((tmp_path / "net" / "sha256.json").read_text())
    del sums["config.json"]
    (tmp_path / "net" / "sha256.json").write_text(json.dumps(sums))
    load_model(tmp_path / "net", Net)


@pytest.mark.parametrize("run_id", ["../../elsewhere", "/etc", "a\nb"])
def test_a_provenance_that_leaves_its_folder(tmp_path: Path, run_id: str) -> None:
    """What is made with a model is put into a folder that is named after its run."""
    saved(tmp_path / "net")
    (tmp_path / "net" / "sha256.json").unlink()
    (tmp_path / "net" / "provenance.json").write_text(json.dumps({"run_id": run_id}))
    with pytest.raises(UserError, match=r"provenance\.json is damaged: run_id"):
        load_model(tmp_path / "net", Net)


def test_a_link_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "net")
    file = tmp_path / "net" / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"model\.safetensors is a link that leads out"):
        load_model(tmp_path / "net", Net)


def test_json_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nesting ended in a RecursionError; a pipe would have been read for ever."""
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    (tmp_path / "long.json").write_text('{"a": "' + "x" * 1000 + '"}')
    os.mkfifo(tmp_path / "pipe.json")
    for name, complaint in (
        ("deep", "recursion"),
        ("pipe", "not a regular"),
        ("long", "1,000 at most"),
    ):
        if name == "long":
            monkeypatch.setattr("utils.files.JSON_BYTES", 1000)
        with pytest.raises(UserError, match=complaint):
            read_json(tmp_path / f"{name}.json")


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_unreadable_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def count_steps(write: object, monkeypatch: pytest.MonkeyPatch, fail_at: int | None) -> int:
    """Run `write`, interrupted at its nth flush or rename; how many of them there were."""
    steps = 0

    def interruptible(real: object) -> object:
        def step(*arguments: object) -> object:
            nonlocal steps
            if steps == fail_at:
                raise KeyboardInterrupt
            steps += 1
            return real(*arguments)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interruptible(os.fsync))
        patch.setattr(Path, "rename", interruptible(Path.rename))
        if fail_at is None:
            write()
        else:
            with pytest.raises(KeyboardInterrupt):
                write()
    return steps


def test_interrupted_at_any_step_the_folder_is_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two renames there was no folder, and the next training began anew."""
    folder = tmp_path / "best"
    states = [saved(folder, seed).state_dict() for seed in (2, 1)]
    steps = count_steps(lambda: saved(folder, 1), monkeypatch, None)
    assert steps >= 7  # the files, the folder, two renames, the parent
    found = set()
    for step in range(steps):
        saved(folder, 2)
        assert same(load_model(tmp_path, Net).model.state_dict(), states[0])
        count_steps(lambda: saved(folder, 1), monkeypatch, step)
        state = load_model(tmp_path, Net).model.state_dict()
        (number,) = (number for number in (0, 1) if same(state, states[number]))
        found.add(number)
        # and once more, where the folder is about to be renamed: there is still one
        count_steps(lambda: saved(folder, 1), monkeypatch, steps - 3)
        load_model(tmp_path, Net)
    assert found == {0, 1}
    saved(folder, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_no_pickle_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "net")
    (tmp_path / "net" / "sha256.json").unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / "net" / "model.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        load_model(tmp_path / "net", Net)
    with pytest.raises(UserError, match="cannot read"):
        read_tensors(tmp_path / "net" / "model.safetensors")


def test_no_pickle_is_written(tmp_path: Path) -> None:
    saved(tmp_path / "net")
    names = sorted(file.name for file in (tmp_path / "net").iterdir())
    assert names == ["config.json", "model.safetensors", "provenance.json", "sha256.json"]
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config == {"width": 3}
