"""The cross-entropy of a large codebook, taken in parts, against that of all logits at once."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transformer import GPT, GPTConfig

CODES, GRID, COUNT = 16_384, (16, 16), 24


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any tensor made under it holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def test_the_loss_in_parts_is_the_whole_one_and_logits_never_stand_whole() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(CODES, latent_dim=GRID, num_layers=1, num_heads=1, dim=16))
    model.eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    prefix = torch.zeros(COUNT, dtype=torch.long)
    indices = torch.randint(CODES, (COUNT, *GRID))
    logits = model(prefix, indices)
    expected = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none")
    weights = torch.rand_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    with Largest() as largest:
        nats = model(prefix, indices, loss=True)
        gradients = torch.autograd.grad((nats.flatten() * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(nats.flatten(), expected)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)
    assert largest.numbers < 0.6 * logits.numel()
