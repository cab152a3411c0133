"""Decoding steps as a GPU captures them: graphs, caches that are shared, one compiled graph."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.test_sampling import make_model, some_indices
from transformer import GPT, SamplingParams, sampling
from transformer.sampling import DecodeStep, generate, generate_rows, next_logits
from utils.data.masks import region_mask


def uncaptured(function: Callable[[], tuple]) -> Callable[[], tuple]:
    """In place of a graph: the function that would be captured."""
    return function


@pytest.fixture
def as_graphs(monkeypatch: pytest.MonkeyPatch) -> list[DecodeStep]:
    """`generate` runs what a GPU would capture; the steps that it made."""
    steps = []

    def make(model: GPT, batch_size: int, **options: object) -> DecodeStep:
        steps.append(DecodeStep(model, batch_size, **options))
        steps[-1].capture = uncaptured
        return steps[-1]

    monkeypatch.setattr(sampling, "DecodeStep", make)
    return steps


@pytest.mark.parametrize(
    "guidance", [{}, {"guidance_scale": 3.0, "guidance_schedule": "cosine"}], ids=str
)
@pytest.mark.parametrize(
    ("size", "window", "options"),
    [
        ((4, 6), 0, {}),
        ((4, 6), 2, {"num_kv_heads": 2}),
        ((6, 7), 0, {"positions": "learned"}),
        ((6, 7), 2, {}),
        ((4, 6), 2, {"depth": 2}),
        ((4, 6), 0, {"order_anneal": (0.5, 0.75)}),
    ],
    ids=str,
)
def test_captured_steps_sample_what_eager_ones_sample(
    size, window, options, guidance, request: pytest.FixtureRequest
) -> None:
    """With guidance and filters; with known positions, and batches of two sizes."""
    model = make_model((4, 6), window, **options)
    prefix, known = some_indices(size, 3)
    if model.config.depth == 2:
        known = torch.stack([known, known], dim=-1)
    known = {"known": known, "known_mask": region_mask("left:0.34", size)}
    params = SamplingParams(temperature=0.9, top_k=8, top_p=0.95, min_p=0.01, **guidance)
    options = {"size": size, "batch_size": 2, "params": params}
    eager, scores = generate(model, prefix, **options), torch.zeros(2, 3)
    completed = generate(model, prefix, scores=scores[0], **known, **options)
    steps = request.getfixturevalue("as_graphs")
    assert torch.equal(generate(model, prefix, **options), eager)
    again = generate(model, prefix, scores=scores[1], **known, **options)
    assert torch.equal(again, completed)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    assert [step.batch_size for step in steps] == [2, 1, 2, 1]


def test_a_graph_reads_the_part_of_the_cache_that_is_written() -> None:
    cache = make_model((4, 6)).make_cache(2)
    assert [cache.prepare(token, 4) for token in (0, 5, 6, 11, 17, 18, 22)] == [
        *(6, 6, 12, 12, 18, 24, 24)
    ]
    assert cache.prepare(6) == 7
    ring = make_model((4, 6), window=2).make_cache(2, (40, 6))
    assert [ring.prepare(token, 4) for token in (0, 2, 3, 11, 12, 199)] == [3, 3, 6, 12, 12, 12]


def test_batches_of_one_size_share_a_cache_and_graphs(as_graphs: list[DecodeStep]) -> None:
    """Each batch had a cache and graphs of its own, beside those of the batch before."""
    generate(make_model(), torch.arange(6) % 4, batch_size=3)
    assert len(as_graphs) == 1
    assert len(as_graphs[0]._graphs) == 4


def test_nothing_of_a_generation_survives_it() -> None:
    """A cache of steps held the last model, and its cache, for as long as the process ran."""
    model = make_model()
    step = DecodeStep(model, 2, compiled=True, size=(4, 6))
    assert step.capture is None  # on a CPU
    rows = list(generate_rows(step, torch.zeros(2, dtype=torch.long), torch.arange(2)))
    assert len(rows) == 4
    left = weakref.ref(model), weakref.ref(step.cache), weakref.ref(step)
    del model, step
    gc.collect()
    assert [one() for one in left] == [None] * 3


@pytest.mark.parametrize("size", [(4, 6), (7, 6)], ids=str)
def test_decoding_compiles_to_one_graph_without_breaks(size: tuple[int, int]) -> None:
    model, counted = make_model((4, 6), num_layers=1, window=3), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        counted.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(next_logits, backend=backend, fullgraph=True)
    options = {"size": size, "params": SamplingParams(guidance_scale=2.0, top_k=5)}
    step = DecodeStep(model, 2, **options)
    step.capture, step.forward = uncaptured, compiled
    prefix, keys = torch.arange(2), torch.arange(2)
    sampled = [
        torch.cat(list(generate_rows(one, prefix, keys)))
        for one in (step, step, DecodeStep(model, 2, **options))
    ]
    assert torch.equal(sampled[0], sampled[2])
    assert torch.equal(sampled[1], sampled[2])
    assert len(counted) <= 2  # of one length of the cache, and of any


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"positions": "learned"}], ids=str)
@pytest.mark.parametrize("window", [0, 2])
def test_graphs_sample_what_eager_steps_sample_on_a_gpu(window: int, options: dict) -> None:
    model = make_model(window=window, dtype=torch.float32, **options)
    prefix = torch.arange(5) % 4
    values = {"size": (7, 6), "params": SamplingParams(temperature=0), "batch_size": 3}
    expected = generate(model, prefix, **values)
    model = model.cuda()
    assert DecodeStep(model, 2, compiled=True, size=(7, 6)).capture is not None
    assert torch.equal(generate(model, prefix, compiled=True, **values), expected)
