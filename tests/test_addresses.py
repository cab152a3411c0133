"""Every kind of address leads to a local path, or is refused in one line."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.conftest import open_run
from utils import addresses
from utils.cli import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses


def test_fetch(store: Any) -> None:
    Path("best").mkdir()
    Path("best/weights.txt").write_text("w")
    with open_run() as run:
        run.folder(Path("best"), "checkpoints/best")
    fetched = addresses.fetch(f"runs:/{run.run_id}/checkpoints/best")
    assert (fetched / "weights.txt").read_text() == "w"
    assert addresses.fetch("some/path") == Path("some/path")
    for address in (f"runs:/{run.run_id}/none", f"runs:/{'0' * 32}/best", "models:/none@best"):
        with pytest.raises(UserError, match=f"cannot fetch {address} from MLflow"):
            addresses.fetch(address)


@pytest.mark.parametrize(
    "address",
    [
        "runs:/../../etc/passwd",
        "runs:/0123/../../secret",
        "runs:/0123//etc",
        "runs:/0123/..",
        "runs:/0123/%2e%2e/secret",
        "models:/a/../b",
        "runs:/0123/a\0b",
        "runs:/0123/a?b#c",
    ],
)
def test_addresses_that_lead_elsewhere_are_refused_unasked(address: str) -> None:
    with pytest.raises(UserError, match="is not the address of an artifact"):
        addresses.fetch(address)
    assert not Path("mlflow.db").exists()


def test_urls_of_other_file_systems(own_folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/best/config.json": b"{}", "/bucket/best/deep/a.txt": b"a"})
    folder = addresses.fetch("memory://bucket/best")
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "deep" / "a.txt").read_text() == "a"
    assert addresses.fetch("memory://bucket/best/config.json").read_text() == "{}"
    assert addresses.fetch("memory://bucket/best") == folder  # not downloaded again
    (own_folder / "data.csv").write_text("x")
    assert addresses.fetch(f"file://{own_folder}/data.csv") == own_folder / "data.csv"


@pytest.mark.parametrize("url", ["nonsense://host/x", "memory://bucket/none"])
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(UserError, match=f"cannot fetch {url}"):
        addresses.fetch(url)


def test_passwords_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://name:secret@host")
    with pytest.raises(UserError, match="cannot use MLflow at nonsense://host") as caught:
        addresses.open_client()
    assert "secret" not in str(caught.value)
