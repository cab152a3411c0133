"""The notebook of the documentation, run cell by cell."""

import json
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_the_quickstart_notebook_generates_digits(capsys: pytest.CaptureFixture) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    variables: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]  # none that this code did not make
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), variables)
    assert variables["mse"] < 0.02
    assert variables["real"] > 0.9
    assert variables["agreement"] > 0.8
