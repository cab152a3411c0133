"""Settings of libraries reach the process before the libraries are loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

SCRIPTS = ("train_vqvae", "train", "quantize_dataset", "transformer_generation", "evaluate")
SCRIPTS += ("vqvae/images_from_indexes",)


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_wait_passively_unless_the_user_decides(own_folder: Path, script: str) -> None:
    """Beside one busy process a training took six times as long: OpenMP's threads were spinning."""
    Path("torch.py").write_text("import os\nprint(os.environ['OMP_WAIT_POLICY'])\nraise SystemExit")
    for policy in ("", "ACTIVE"):
        given = environment(PYTHONPATH=str(own_folder), OMP_WAIT_POLICY=policy)
        if not policy:
            del given["OMP_WAIT_POLICY"]
        command = [sys.executable, ROOT / f"{script}.py"]
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
        assert done.stdout == f"{policy or 'PASSIVE'}\n", done.stderr
