"""The step with its position in a tensor against the plain one, and as a CUDA graph."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.test_drawing import make_model, some_indices
from transformer import GPT, Beyond, generate
from transformer.graph import GraphStep, make_step, step_at


def both(model: GPT, size: tuple[int, int], beyond: Beyond, step=step_at) -> tuple[Tensor, Tensor]:
    """Logits of all cells by the plain step and by the other one, (B, h*w, K) each."""
    prefix, indices = some_indices(size)
    caches = [model.make_cache(len(prefix), size, beyond) for _ in range(2)]
    tokens, one, two = prefix, [], []
    with torch.inference_mode():
        for position in range(size[0] * size[1]):
            one.append(model.step(tokens, position, caches[0]))
            if position < caches[1].prefix:
                two.append(model.step(tokens, position, caches[1]))
            else:
                caches[1].move_to(position)
                two.append(step(model, caches[1], tokens, torch.tensor([position])))
            tokens = indices.flatten(1)[:, position]
    return torch.stack(one, dim=1), torch.stack(two, dim=1)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize(
    ("size", "beyond"),
    [
        ((4, 6), Beyond.SLIDE),
        ((9, 8), Beyond.SLIDE),
        ((9, 8), Beyond.INTERPOLATE),
        ((3, 11), Beyond.EXTRAPOLATE),
    ],
    ids=str,
)
def test_a_position_in_a_tensor_gives_the_same_logits(size, beyond, window, options) -> None:
    one, two = both(make_model((4, 6), window, **options), size, beyond)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_one_compiled_graph_serves_all_cells() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(step_at, backend=backend, fullgraph=True)
    one, two = both(make_model(window=2, num_layers=1), (7, 6), Beyond.SLIDE, step)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1


def test_on_a_cpu_the_step_is_the_plain_one() -> None:
    model = make_model()
    step = make_step(model, model.make_cache(2), compiled=False)
    assert isinstance(step, partial)
    assert step.func == model.step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 2])
def test_the_graph_draws_what_the_plain_step_draws(window: int) -> None:
    model = make_model(window=window, dtype=torch.float32)
    prefix = torch.arange(5) % 4
    options = {"size": (7, 6), "temperature": 0, "batch_size": 3}
    expected = generate(model, prefix, **options)
    model = model.cuda()
    assert isinstance(make_step(model, model.make_cache(2), compiled=True), GraphStep)
    assert torch.equal(generate(model, prefix, compiled=True, **options), expected)
