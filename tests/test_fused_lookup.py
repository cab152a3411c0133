"""The codebook lookup in one kernel beside the lookup in PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqvae.quantizers.codebook import nearest_codes

SHAPES = [(130, 100, 8), (7, 300, 3), (64, 64, 100), (1, 1, 1)]  # N, K, D
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INTERPRETED = f"""
import torch
from vqvae.quantizers.codebook import nearest_codes
from vqvae.quantizers.fused_lookup import fused_nearest_codes
torch.manual_seed(0)
for n, k, d in {SHAPES}:
    vectors, codebook = torch.randn(n, d), torch.randn(k, d)
    for offsets in (codebook.square().sum(dim=1) / 2, torch.randn(k)):
        found = fused_nearest_codes(vectors, codebook, offsets)
        assert found.dtype == torch.int64
        assert torch.equal(found, nearest_codes(vectors, codebook, offsets)), (n, k, d)
    copies = codebook.new_tensor([[1.0]]).expand(k, d)
    assert not fused_nearest_codes(vectors.round(), copies, copies[:, 0]).any()  # the lowest index
"""


def excess(vectors: Tensor, codebook: Tensor, indices: Tensor) -> float:
    """How much farther the given codes are than the nearest, relative to the mean distance."""
    distances = torch.cdist(vectors.double(), codebook.double()).square()
    found = distances.gather(1, indices[:, None])
    return float(((found[:, 0] - distances.min(dim=1).values) / distances.mean()).max())


def test_the_kernel_finds_the_nearest_codes_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, cwd=root)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 16384, 8), (3000, 1024, 256)], ids=str)
def test_the_kernel_finds_the_nearest_codes_on_a_gpu(shape: tuple[int, int, int]) -> None:
    n, k, d = shape
    vectors, codebook = torch.randn(n, d, device="cuda"), torch.randn(k, d, device="cuda")
    indices = nearest_codes(vectors, codebook)
    assert excess(vectors, codebook, indices) < 1e-5
    expected = nearest_codes(vectors.double(), codebook.double())
    assert float((indices == expected).double().mean()) > 0.999


@pytest.mark.gpu
@needs_gpu
def test_the_lookup_holds_no_distances_on_a_gpu() -> None:
    n, k = 32768, 16384
    vectors, codebook = torch.randn(n, 8, device="cuda"), torch.randn(k, 8, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nearest_codes(vectors, codebook)
    assert torch.cuda.max_memory_allocated() - before < 4 * n * k / 100  # of one in float32 each
