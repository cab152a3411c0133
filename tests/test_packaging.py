"""What `pip install .` installs, and the lists of requirements."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.reading import ROOT
from tests.forks import run_forked
from transformer import GPT, GPTConfig
from utils.files import write_folder
from utils.provenance import Provenance, model_files
from vqvae import VQVAE, VQVAEConfig

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(text: str) -> set[str]:
    """The requirements of a file, without comments and references to other files."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return {line for line in lines if line and not line.startswith("-r")}


def locked() -> dict[str, str]:
    lines = names((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    pins = (line.split("==") for line in lines)
    return {re.sub(r"[-_.]+", "-", name).lower(): pinned for name, pinned in pins}


def test_only_the_model_packages_are_installed(tmp_path: Path) -> None:
    """A package named utils would collide with others."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vqvae", "transformer", "utils", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    found = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert found == {"vqvae", "transformer"}
    assert {"vqvae/model.py", "vqvae/quantizers/__init__.py", "transformer/gpt.py"} <= set(files)


def test_requirements_are_those_of_the_project() -> None:
    extras = PROJECT["optional-dependencies"]
    users = names((ROOT / "requirements.txt").read_text())
    assert users == {*PROJECT["dependencies"], *extras["scripts"]}
    developers = names((ROOT / "requirements-dev.txt").read_text())
    parts = ("lpips", "inception", "dinov2", "dev")
    assert developers == {name for part in parts for name in extras[part]}


def test_the_lock_file_satisfies_all_requirements() -> None:
    pins = locked()
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in names((ROOT / file).read_text()):
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[requirement.name.lower()]), line


def test_the_lock_file_names_no_places() -> None:
    for line in names((ROOT / "requirements.lock").read_text()):
        assert re.fullmatch(r"[\w.-]+==[\w.!+-]+", line), line


def test_packages_that_are_lifted_out_read_a_model_folder(own_folder: Path) -> None:
    """A tokenizer's config.json did not make the tokenizer."""
    tokenizer = VQVAE(VQVAEConfig.create(image_size=(8, 8), in_channels=1, channels=8))
    gpt = GPT(GPTConfig(8, latent_dim=(2, 2), num_layers=1, num_heads=1, dim=16))
    for name, model in {"tokenizer": tokenizer, "gpt": gpt}.items():
        write_folder(own_folder / name, model_files(model, Provenance()))
    for name in ("vqvae", "transformer"):
        shutil.copytree(ROOT / name, own_folder / name)
    code = "from transformer import GPT; from vqvae import VQVAE\n"
    code += "VQVAE.from_pretrained('tokenizer'), GPT.from_pretrained('gpt')\n"
    code += "import sys; print('utils' in sys.modules, sys.modules['vqvae'].__file__)"
    done = run_forked("-c", code, check=True)
    assert done.stdout == f"False {own_folder}/vqvae/__init__.py\n"


def test_the_slurm_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)
