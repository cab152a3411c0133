"""Sharing on the Hugging Face Hub, against a stand-in that keeps repositories in a folder."""

import shutil
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import run_script
from transformer import GPT, GPTConfig
from utils import hub
from utils.data.vocabulary import Vocabulary
from utils.files import write_folder
from utils.provenance import Provenance, Stage, load_model, model_files


@pytest.fixture
def repositories(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = own_folder / "hub"

    class HfApi:
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
            (home / repo).mkdir(parents=True, exist_ok=exist_ok)

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
            (home / repo_id / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            shutil.copytree(folder_path, home / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo: str, local_dir: str) -> None:
        shutil.copytree(home / repo, local_dir, dirs_exist_ok=True)

    fake = types.SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setattr(hub, "import_hub", lambda: fake)
    return home


def write_gpt(folder: Path) -> None:
    vocabulary = Vocabulary(8, (4, 4), class_names=("cat", "dog"))
    model = GPT(GPTConfig(dim=16, num_layers=1, num_heads=1, **vocabulary.model_values))
    stage = replace(Stage.now("gpt", {}, ""), command="python train.py --path_to_data indices")
    content = model_files(model, Provenance(lineage=(stage,)))
    write_folder(folder, content | {"vocabulary.json": vocabulary.content()})


def test_what_is_pushed_can_be_pulled_and_is_described(repositories: Path) -> None:
    write_gpt(Path("gpt/best"))
    run_script("utils/hub.py", "push", "gpt", "me/gpt", "--license", "mit")
    card = (repositories / "me/gpt/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    for text in ("| classes | cat, dog |", "| dim | 16 |", "train.py --path_to_data indices"):
        assert text in card
    run_script("utils/hub.py", "pull", "me/gpt", "copy")
    one, two = load_model("gpt", GPT).model, load_model("copy", GPT).model
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_what_cannot_be_shared_is_refused(repositories: Path, error_of: Callable[..., str]) -> None:
    write_gpt(Path("gpt"))
    assert "no such model folder: none" in error_of("utils.hub", "push", "none", "me/gpt")
    assert "gpt exists and is not empty" in error_of("utils.hub", "pull", "me/x", "gpt")
    assert "cannot pull me/x" in error_of("utils.hub", "pull", "me/x", "new")
    (Path("gpt") / "model.safetensors").write_bytes(b"damaged")
    assert "gpt is damaged" in error_of("utils.hub", "push", "gpt", "me/gpt")
    assert not (repositories / "me").exists()
