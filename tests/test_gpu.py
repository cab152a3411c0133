"""What holds on a CPU holds on a GPU: losses, gradients, learning in bfloat16, memory."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.test_kv_cache import make_model
from transformer import GPT, FlexAttention, SamplingParams
from transformer.sampling import generate
from utils import distributed
from vqvae import VQVAE, VQVAEConfig
from vqvae.losses import LossConfig, ReconstructionLoss
from vqvae.train_step import forward_backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
GRID = (12, 9)


@pytest.mark.parametrize("fused", [False, True], ids=["tiles", "flex"])
@pytest.mark.parametrize("window", [0, 3])
def test_the_loss_of_a_gpt_and_its_gradients_are_those_of_a_cpu(window: int, fused: bool) -> None:
    reference = make_model(GRID, window=window, dim=64)  # FlexAttention needs heads of 16 or more
    prefix = torch.arange(3) % 4
    indices = torch.randint(reference.config.codebook_size, (3, *GRID))
    reference.loss(prefix, indices).mean().backward()
    attend = {"attend": FlexAttention(GPU, grid=GRID, window=window)} if fused else {}
    model = GPT(reference.config, **attend).eval().to(GPU)
    model.load_state_dict(reference.state_dict())
    model.loss(prefix.to(GPU), indices.to(GPU)).mean().backward()
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        error = (ours.grad.cpu() - expected.grad).norm() / expected.grad.norm().clamp_min(1e-6)
        assert float(error) < 1e-2


def curve(model: torch.nn.Module, step: Callable[[int], Tensor], rate: float) -> float:
    """The mean of the last of 150 losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    losses = []
    for number in range(150):
        losses.append(float(step(number)))
        optimizer.step()
        optimizer.zero_grad()
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpt_learns_in_bfloat16_what_it_learns_in_float32(compiled: bool) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        model = make_model(GRID, dtype=torch.float32, dropout=0.0).to(GPU).train()
        torch.nn.init.normal_(model.head.weight, std=0.02)
        torch.manual_seed(1)
        rows = torch.randint(model.config.codebook_size, (64, GRID[0], 1)).expand(-1, -1, GRID[1])
        loss = torch.compile(model.loss) if compiled else model.loss

        def step(number: int, *, loss=loss, rows=rows, precision=precision) -> Tensor:
            with distributed.autocast(GPU, precision):
                value = loss(torch.zeros(64, dtype=torch.long, device=GPU), rows.to(GPU)).mean()
            value.backward()
            return value.detach()

        found[precision] = curve(model, step, 3e-3)
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.05)
    assert found["fp32"] < 1.0  # of log(codebook_size): rows repeat their first token


def test_a_tokenizer_learns_in_bfloat16_what_it_learns_in_float32() -> None:
    torch.manual_seed(1)
    shapes = torch.rand(64, 1, 4, 4, device=GPU).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found, losses = {}, ReconstructionLoss(LossConfig()).to(GPU)
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        config = VQVAEConfig.create(
            image_size=(16, 16), in_channels=1, channels=32, codebook_size=64
        )
        model = VQVAE(config).to(GPU, memory_format=torch.channels_last).train()
        autocast = partial(distributed.autocast, GPU, precision)

        def step(number: int, *, model=model, autocast=autocast) -> Tensor:
            values = forward_backward(model, shapes * 2 - 1, losses, autocast)[0]
            return values["mse"]

        found[precision] = curve(model, step, 2e-3)
    assert found["bf16"] < 1.2 * found["fp32"], found


@pytest.mark.parametrize("window", [0, 3])
def test_the_memory_of_sampling_does_not_grow_with_the_number_of_images(window: int) -> None:
    model = make_model(GRID, window=window, dtype=torch.float32).to(GPU)
    peaks = []
    for count in (8, 8, 64):
        torch.cuda.reset_peak_memory_stats()
        params = SamplingParams(guidance_scale=2.0)
        generate(model, torch.arange(count) % 4, batch_size=8, params=params)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] < 1.05 * peaks[1]
