"""Training in several processes and in micro-batches: what one pass over the global batch does."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.forks import CONTEXT
from tests.test_quantizers import make
from vqvae import QUANTIZERS, VQVAE, VQVAEConfig
from vqvae.losses import LossConfig, ReconstructionLoss
from vqvae.quantizers.codebook import MAX_PASSES
from vqvae.train_step import forward_backward

EVERY = pytest.mark.parametrize("name", QUANTIZERS)
# Each optional mechanism is on: entropies, and so high a threshold that codes die in every step.
OPTIONS = {"entropy_weight": 0.1, "dead_code_threshold": 0.999}
SIZES = {"fsq": {"levels": (4, 2, 3)}, "lfq": {"codebook_dim": 11}}
STEPS, BATCH = 4, 8


def batch(step: int) -> Tensor:
    """A global batch of images, which wander, so that codes die."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 8, 8, generator=random, dtype=torch.double) * 0.3
    return images + step / STEPS


def train(name: str, accumulate: int, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """Weights, codes and losses after a few steps of gradient descent in float64."""
    known = vars(QUANTIZERS[name].Options())
    options = SIZES.get(name, {"codebook_size": 16, "codebook_dim": 4})
    options |= {key: value for key, value in OPTIONS.items() if key in known}
    torch.manual_seed(0)
    network = {"image_size": (8, 8), "in_channels": 3, "patch_size": 2, "channels": 8}
    model = VQVAE(VQVAEConfig.create(quantizer=name, **network, **options)).double()
    torch.manual_seed(rank)  # other random numbers have no effect
    losses = ReconstructionLoss(LossConfig(l1_weight=0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    logged = {}
    for step in range(STEPS):
        images = batch(step).chunk(processes)[rank]
        values, _ = forward_backward(model, images, losses, nullcontext, accumulate=accumulate)
        for tensor in [*values.values(), *(x.grad for x in model.parameters() if x.requires_grad)]:
            if processes > 1:
                dist.all_reduce(tensor)
                tensor /= processes
        logged |= {f"{key} of step {step}": value for key, value in values.items()}
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict() | logged


def work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    states = {(name, n): train(name, n, rank, 2) for name in QUANTIZERS for n in (1, 2)}
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("processes")
    ranks = [CONTEXT.Process(target=work, args=(rank, str(folder))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {name: train(name, 1) for name in QUANTIZERS}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-8, msg=key)


@EVERY
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_train_like_the_whole_batch(
    name: str, accumulate: int, alone: dict[str, dict[str, Tensor]]
) -> None:
    assert_same(train(name, accumulate), alone[name])


@EVERY
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_like_one(
    name: str, accumulate: int, states: list[dict], alone: dict[str, dict[str, Tensor]]
) -> None:
    for state in states:
        assert_same(state[name, accumulate], alone[name])
    offsets = [value for key, value in alone[name].items() if key.endswith("rng_offset")]
    assert not offsets or min(offsets) > 1  # codes were initialised and reset


def quantize(name: str, state: dict[str, Tensor] | None, steps: range) -> dict[str, Tensor]:
    """The state of a codebook after steps in which nothing else moves it."""
    quantizer = make(name, codebook_size=8, codebook_dim=4, dead_code_threshold=0.999)
    if state is not None:
        quantizer.load_state_dict(state)
    for step in steps:
        random = torch.Generator().manual_seed(step)
        quantizer(torch.randn(2, 4, 5, 5, generator=random) * 0.1 + 3 * step)
        quantizer.end_step()
    return quantizer.state_dict()


@pytest.mark.parametrize(
    "name", [name for name, q in QUANTIZERS.items() if hasattr(q.Options, "dead_code_threshold")]
)
def test_sampled_codes_are_reproducible_and_continue_after_a_checkpoint(name: str) -> None:
    whole = quantize(name, None, range(4))
    torch.manual_seed(99)
    parts = quantize(name, quantize(name, None, range(2)), range(2, 4))
    assert all(torch.equal(value, whole[key]) for key, value in parts.items())


def test_ema_codes_are_the_moving_averages_of_their_vectors() -> None:
    quantizer = make("ema", codebook_size=4, codebook_dim=2, dead_code_threshold=0.0)
    vectors = torch.randn(40, 2)
    _, indices, _ = quantizer.quantize(vectors)  # the codes start
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    quantizer.end_step()
    assert torch.equal(quantizer.codebook, quantizer.sums / quantizer.counts[:, None])
    for code in range(4):
        mine = vectors[indices == code]
        torch.testing.assert_close(quantizer.counts[code], 0.99 * counts[code] + 0.01 * len(mine))
        torch.testing.assert_close(quantizer.sums[code], 0.99 * sums[code] + 0.01 * mine.sum(0))


@pytest.mark.parametrize("name", ["vq", "ibq", "gumbel"])
def test_a_dead_code_is_reset_to_a_vector_which_then_chooses_it(name: str) -> None:
    quantizer = make(name, codebook_size=4, codebook_dim=2)
    quantizer.initialise(torch.randn(40, 2))
    quantizer.set_codes(torch.tensor([3]), torch.tensor([[50.0, 50.0]]))
    quantizer.usage_ema[3] = 0.0
    vectors = torch.randn(40, 2)
    quantizer.quantize(vectors)
    quantizer.end_step()
    assert (quantizer.codebook[3] == vectors).all(dim=1).any()
    assert quantizer.usage_ema[3] == 0.25
    assert quantizer.assign(quantizer.codebook[3:]).tolist() == [3]


def test_a_loop_that_never_ends_its_steps_is_told() -> None:
    quantizer = make("vq", codebook_size=4, codebook_dim=2)
    for _ in range(MAX_PASSES + 1):
        quantizer.quantize(torch.randn(4, 2))
    with pytest.raises(RuntimeError, match=r"end_step\(\)"):
        quantizer.quantize(torch.randn(4, 2))
