"""The step with its position in a tensor against the plain one, and as CUDA graphs."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.test_drawing import make_model, some_indices
from transformer import GPT, Guidance, PositionExtension, SamplingParams, generate, sampling
from transformer.graph import GraphStep, draw_at, make_step, step_at
from transformer.step import Step
from utils.data.given import keep_side


def both(
    model: GPT, size: tuple[int, int], position_extension: PositionExtension, step=step_at
) -> tuple[Tensor, Tensor]:
    """Logits of all cells by the plain step and by the other one, (B, h*w, K) each."""
    prefix, indices = some_indices(size)
    caches = [model.make_cache(len(prefix), size, position_extension) for _ in range(2)]
    tokens, one, two = prefix, [], []
    with torch.inference_mode():
        for cell in range(size[0] * size[1]):
            one.append(model.step(tokens, cell, caches[0]))
            if cell == 0:
                two.append(model.step(tokens, cell, caches[1]))
            else:
                caches[1].move_to(cell)
                slots = caches[1].ring
                two.append(step(model, caches[1], tokens, torch.tensor([cell]), slots))
            tokens = indices.flatten(1)[:, cell]
    return torch.stack(one, dim=1), torch.stack(two, dim=1)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize(
    ("size", "position_extension"),
    [
        ((4, 6), PositionExtension.SLIDE),
        ((9, 8), PositionExtension.SLIDE),
        ((9, 8), PositionExtension.INTERPOLATE),
        ((3, 11), PositionExtension.EXTRAPOLATE),
    ],
    ids=str,
)
def test_a_position_in_a_tensor_gives_the_same_logits(
    size, position_extension, window, options
) -> None:
    one, two = both(make_model((4, 6), window, **options), size, position_extension)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_one_compiled_graph_serves_all_cells() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(step_at, backend=backend, fullgraph=True)
    one, two = both(make_model(window=2, num_layers=1), (7, 6), PositionExtension.SLIDE, step)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1


def unrecorded(function: Callable[[], tuple]) -> Callable[[], tuple]:
    """In place of a graph: the function that would be recorded."""
    return function


@pytest.fixture
def as_graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphStep]:
    """`generate` draws by functions that a GPU would record; the steps that it made."""
    steps = []

    def make(model: GPT, batch_size: int, *, compiled: bool = False, **options: object) -> Step:
        steps.append(GraphStep(model, batch_size, record=unrecorded, **options))
        return steps[-1]

    monkeypatch.setattr(sampling, "make_step", make)
    return steps


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0, "cosine")], ids=str)
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("size", [(4, 6), (9, 8)], ids=str)
def test_what_is_recorded_draws_what_the_plain_step_draws(
    size, window, guidance, request: pytest.FixtureRequest
) -> None:
    """With guidance, params and the draw; with given cells, and batches of two sizes."""
    model = make_model((4, 6), window)
    prefix, given = some_indices(size, 5)
    keep = keep_side("left:0.34", size)
    params = SamplingParams(temperature=0.9, top_k=8, top_p=0.95, min_p=0.01)
    options = {"size": size, "batch_size": 2, "guidance": guidance, "params": params}
    plain, scores = generate(model, prefix, **options), torch.zeros(2, 5)
    completed = generate(model, prefix, given=given, keep=keep, scores=scores[0], **options)
    steps = request.getfixturevalue("as_graphs")
    assert torch.equal(generate(model, prefix, **options), plain)
    again = generate(model, prefix, given=given, keep=keep, scores=scores[1], **options)
    assert torch.equal(again, completed)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    assert [step.batch_size for step in steps] == [2, 1, 2, 1]


def test_a_graph_reads_the_part_of_the_cache_that_is_in_use() -> None:
    step = GraphStep(make_model((4, 6)), 2, record=unrecorded, size=(4, 6))
    assert [step.slots(token) for token in (1, 6, 7, 12, 18, 19, 23)] == [6, 6, 12, 12, 18, 24, 24]
    ring = GraphStep(make_model((4, 6), window=2), 2, record=unrecorded, size=(40, 6))
    assert [ring.slots(token) for token in (1, 3, 4, 12, 13, 200)] == [3, 3, 6, 12, 12, 12]


def test_batches_of_one_size_share_a_cache_and_graphs(as_graphs: list[GraphStep]) -> None:
    """Each batch had a cache and a recording of its own, beside those of the batch before."""
    generate(make_model(), torch.arange(6) % 4, batch_size=3)
    assert len(as_graphs) == 1
    assert len(as_graphs[0]._graphs) == 4


def test_nothing_of_a_drawing_survives_it() -> None:
    """A cache of steps held the last model, and its cache, for as long as the process ran."""
    model = make_model()
    step = make_step(model, 2, compiled=True, size=(4, 6))
    rows = list(sampling.generate_rows(step, torch.zeros(2, dtype=torch.long), torch.arange(2)))
    assert len(rows) == 4
    left = weakref.ref(model), weakref.ref(step.cache), weakref.ref(step)
    del model, step
    gc.collect()
    assert [one() for one in left] == [None] * 3


def test_on_a_cpu_the_step_is_the_plain_one() -> None:
    assert type(make_step(make_model(), 2, compiled=True, size=(4, 6))) is Step


def test_drawing_compiles_to_one_graph_without_breaks() -> None:
    model, counted = make_model((4, 6), num_layers=1), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        counted.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(draw_at, backend=backend, fullgraph=True)
    options = {"size": (4, 6), "guidance": Guidance(2.0), "params": SamplingParams(top_k=5)}
    step = GraphStep(model, 2, draw=compiled, record=unrecorded, **options)
    prefix, keys = torch.arange(2), torch.arange(2)
    drawn = [
        torch.cat(list(sampling.generate_rows(one, prefix, keys)))
        for one in (step, step, Step(model, 2, **options))
    ]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[2])
    assert len(counted) <= 2  # of one length of the cache, and of any


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 2])
def test_the_graphs_draw_what_the_plain_step_draws(window: int) -> None:
    model = make_model(window=window, dtype=torch.float32)
    prefix = torch.arange(5) % 4
    options = {"size": (7, 6), "params": SamplingParams(temperature=0), "batch_size": 3}
    expected = generate(model, prefix, **options)
    model = model.cuda()
    assert isinstance(make_step(model, 2, compiled=True, size=(7, 6)), GraphStep)
    assert torch.equal(generate(model, prefix, compiled=True, **options), expected)
