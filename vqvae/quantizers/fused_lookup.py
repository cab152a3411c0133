"""Codebook lookup on CUDA in one kernel; a file of its own, as importing Triton is slow."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CODES, WARPS = 64, 128, 4  # vectors of one program, codes that it compares at once
CHUNK = tl.constexpr(32)  # of the sums over dimensions


@triton.jit
def _split_vectors(vectors, rows, columns, num_vectors, dim):  # type: ignore[no-untyped-def]
    """Columns of [high, low, high, 1, 1, 1, 0, ...], where high + low are the vectors."""
    part = columns // dim
    x = tl.load(
        vectors + rows[:, None].to(tl.int64) * dim + (columns % dim)[None, :],
        mask=(rows < num_vectors)[:, None] & (part < 3)[None, :],
        other=0.0,
    )
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    x = tl.where((part == 1)[None, :], x - high, high)
    return x + ((columns >= 3 * dim) & (columns < 3 * dim + 3)).to(tl.float32)[None, :]


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    vectors,
    codes,
    indices,
    num_vectors,
    num_codes,
    dim,
    width: tl.constexpr,
    row_block: tl.constexpr,
    code_block: tl.constexpr,
):
    rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    chunk = tl.arange(0, CHUNK)
    first = _split_vectors(vectors, rows, chunk, num_vectors, dim)
    lowest = tl.full((row_block, code_block), float("inf"), tl.float32)
    number = tl.zeros((row_block, code_block), tl.int32)
    for start in range(0, num_codes, code_block):
        numbers = start + tl.arange(0, code_block)
        address = codes + numbers[None, :] * width + chunk[:, None]
        score = tl.dot(first, tl.load(address), input_precision="tf32")
        if width > CHUNK:
            for column in range(CHUNK, width, CHUNK):
                x = _split_vectors(vectors, rows, column + chunk, num_vectors, dim)
                score = tl.dot(x, tl.load(address + column), score, input_precision="tf32")
        # Every column keeps its own minimum, so that columns are compared only once, at the end.
        number = tl.where(score < lowest, numbers[None, :], number)
        lowest = tl.minimum(score, lowest)
    nearest = tl.min(lowest, axis=1)
    ties = tl.where(lowest == nearest[:, None], number, num_codes)
    tl.store(indices + rows, tl.min(ties, axis=1).to(tl.int64), mask=rows < num_vectors)


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 values as a sum of one that TF32 holds exactly, and the rest."""
    high = (values.view(torch.int32) & -(1 << 13)).view(torch.float32)  # without 13 bits
    return high, values - high


def fused_nearest_codes(vectors: Tensor, codebook: Tensor, offsets: Tensor) -> Tensor:
    """`codebook.nearest_codes` without the (N, K) scores in memory, which it takes in float32.

    The scores are one product in TF32 on the matrix units: of the vectors' high and low bits with
    those of the codes, and of ones with the offsets. Only low times low is left out, 2^-22 of it.

    Vectors (N, D), codebook (K, D), offsets (K,) of one CUDA device -> indices (N,), int64.
    """
    (count, dim), size = vectors.shape, len(codebook)
    width = triton.cdiv(3 * dim + 3, CHUNK.value) * CHUNK.value
    codes = codebook.new_zeros(triton.cdiv(size, CODES) * CODES, width)
    (high, low), (offset, rest) = _split(-codebook), _split(offsets)
    torch.cat([high, high, low, offset[:, None]], dim=1, out=codes[:size, : 3 * dim + 1])
    codes[:size, 3 * dim + 1], codes[:size, 3 * dim + 2] = _split(rest)
    codes[size:, 3 * dim] = 1e38  # what fills the last block is far from all vectors
    indices = torch.empty(count, dtype=torch.int64, device=vectors.device)
    with torch.cuda.device_of(vectors):
        blocks = {"row_block": ROWS, "code_block": CODES, "num_warps": WARPS}
        inputs = vectors.contiguous(), codes, indices, count, size, dim
        _kernel[triton.cdiv(count, ROWS), 1, 1](*inputs, width=width, **blocks)
    return indices
