"""Codebooks in several processes: what one process would do with their global batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from tests.test_quantizers import make
from vqvae import QUANTIZERS

NAMES = [name for name, q in QUANTIZERS.items() if hasattr(q.Options, "dead_code_threshold")]
STEPS = 4
# With so high a threshold codes die in every step.
HIGH_THRESHOLD = {"codebook_size": 8, "codebook_dim": 4, "dead_code_threshold": 0.999}


def batches(rank: int) -> list[Tensor]:
    """Of a process: clusters that wander, so that codes die and are reset."""
    random = torch.Generator().manual_seed(rank)
    return [torch.randn(2, 4, 5, 5, generator=random) * 0.1 + 3 * step for step in range(STEPS)]


def train(name: str, steps: list[Tensor]) -> dict[str, Tensor]:
    """The state of a codebook after a forward pass on each batch; nothing else moves it."""
    quantizer = make(name, **HIGH_THRESHOLD)
    torch.manual_seed(len(steps[0]))  # other random numbers have no effect
    for batch in steps:
        quantizer(batch)
    return quantizer.state_dict()


def work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    states = {name: train(name, batches(rank)) for name in NAMES}
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_do_what_one_does_with_the_global_batch(name: str, states: list) -> None:
    first, second = (state[name] for state in states)
    global_batches = [torch.cat(pair) for pair in zip(batches(0), batches(1), strict=True)]
    alone = train(name, global_batches)
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key], value, atol=1e-5), key
    offsets = [value for key, value in alone.items() if key.endswith("rng_offset")]
    assert min(offsets) > 1  # codes were initialised and reset


@pytest.mark.parametrize("name", NAMES)
def test_sampled_codes_are_reproducible_and_continue_after_a_checkpoint(name: str) -> None:
    steps = batches(0)
    whole = train(name, steps)
    quantizer = make(name, **HIGH_THRESHOLD)
    quantizer.load_state_dict(train(name, steps[:2]))
    torch.manual_seed(99)
    for batch in steps[2:]:
        quantizer(batch)
    assert all(torch.equal(value, whole[key]) for key, value in quantizer.state_dict().items())


def test_ema_codes_are_the_moving_averages_of_their_vectors() -> None:
    quantizer = make("ema", codebook_size=4, codebook_dim=2, dead_code_threshold=0.0)
    vectors = torch.randn(40, 2)
    quantizer.quantize(vectors)  # the codes start
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    _, indices, _ = quantizer.quantize(vectors)
    expected = sums / counts[:, None]
    assert torch.equal(quantizer.codebook, expected)
    for code in range(4):
        mine = vectors[indices == code]
        torch.testing.assert_close(quantizer.counts[code], 0.99 * counts[code] + 0.01 * len(mine))
        torch.testing.assert_close(quantizer.sums[code], 0.99 * sums[code] + 0.01 * mine.sum(0))


def test_a_dead_code_is_reset_to_a_vector() -> None:
    quantizer = make("vq", codebook_size=4, codebook_dim=2)
    quantizer.initialised.fill_(True)
    with torch.no_grad():
        quantizer.embedding.weight[:] = torch.tensor([[0.0, 0], [1, 0], [0, 1], [50, 50]])
    quantizer.usage_ema[3] = 0.0
    vectors = torch.randn(40, 2)
    quantizer.quantize(vectors)
    assert (quantizer.codebook[3] == vectors).all(dim=1).any()
    assert quantizer.usage_ema[3] == 0.25
