"""The files in which benchmarks leave their results."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import record


def test_a_result_says_where_and_how_it_was_made(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(own_folder / "mnist" / "train.csv")  # a path of one machine says nothing elsewhere
    words = ["/somewhere/benchmarks/speed.py", "--size", "a b", "--data", data]
    monkeypatch.setattr(sys, "argv", words)
    path = record.write("speed", {"images_per_second": 12.5})
    assert path == Path("benchmarks/results/speed.json")
    content = json.loads((own_folder / path).read_text())
    assert content["results"] == {"images_per_second": 12.5}
    assert content["command"] == "python -m benchmarks.speed --size 'a b' --data mnist/train.csv"
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["cores"] >= 1
    assert len(content["date"]) == 10


def test_rows_are_put_beside_those_of_before(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/tests/faults/__main__.py", "--only", "disk"])
    record.merge("rows", {"disk": {"held": False}, "kill": {"held": True}})
    path = record.merge("rows", {"disk": {"held": True}})
    content = json.loads((own_folder / path).read_text())
    assert list(content) == ["disk", "kill"]
    assert content["disk"]["held"]
    assert content["kill"]["command"] == "python -m tests.faults --only disk"
    assert "date" in content["disk"]
