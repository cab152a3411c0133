"""Codebook lookup on CUDA in one kernel; a file of its own, as importing Triton is slow."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CODES, WARPS = 64, 64, 4  # vectors of one program, codes that it compares at once


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    vectors,
    codebook,
    offsets,
    indices,
    num_vectors,
    codebook_size,
    dim: tl.constexpr,
    dim_block: tl.constexpr,
    row_block: tl.constexpr,
    code_block: tl.constexpr,
):
    rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    lowest = tl.full((row_block, code_block), float("inf"), tl.float32)
    number = tl.zeros((row_block, code_block), tl.int32)
    for start in range(0, codebook_size, code_block):
        codes = start + tl.arange(0, code_block)
        products = tl.zeros((row_block, code_block), tl.float32)
        for first in tl.static_range(0, dim, dim_block):
            dims = first + tl.arange(0, dim_block)
            x = tl.load(
                vectors + rows[:, None].to(tl.int64) * dim + dims[None, :],
                mask=(rows[:, None] < num_vectors) & (dims[None, :] < dim),
                other=0.0,
            )
            c = tl.load(
                codebook + codes[None, :] * dim + dims[:, None],
                mask=(codes[None, :] < codebook_size) & (dims[:, None] < dim),
                other=0.0,
            )
            # Three products in TF32 are as exact as one in float32, and run on matrix units.
            products = tl.dot(x, c, products, input_precision="tf32x3")
        offset = tl.load(offsets + codes, mask=codes < codebook_size, other=float("inf"))
        score = offset[None, :] - products
        # Every column keeps its own minimum, so that columns are compared only once, at the end.
        closer = score < lowest
        lowest = tl.where(closer, score, lowest)
        number = tl.where(closer, codes[None, :], number)
    nearest = tl.min(lowest, axis=1)
    ties = tl.where(lowest == nearest[:, None], number, codebook_size - 1)
    tl.store(indices + rows, tl.min(ties, axis=1).to(tl.int64), mask=rows < num_vectors)


def fused_nearest_codes(vectors: Tensor, codebook: Tensor, offsets: Tensor) -> Tensor:
    """`codebook.nearest_codes` without the (N, K) scores in memory, which it takes in float32.

    Vectors (N, D), codebook (K, D), offsets (K,) of one CUDA device -> indices (N,), int64.
    """
    indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    dim = vectors.shape[1]
    with torch.cuda.device_of(vectors):
        _kernel[triton.cdiv(len(vectors), ROWS), 1, 1](
            vectors.contiguous(),
            codebook.contiguous(),
            offsets.contiguous(),
            indices,
            len(vectors),
            len(codebook),
            dim=dim,
            dim_block=min(64, max(16, triton.next_power_of_2(dim))),
            row_block=ROWS,
            code_block=CODES,
            num_warps=WARPS,
        )
    return indices
