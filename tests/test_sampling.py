"""Sampling: filters, random numbers, the loop over tokens, known positions, captured graphs."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from tests import test_kv_cache
from tests.test_kv_cache import at_once
from transformer import GPT, PositionExtension, SamplingParams, sampling
from transformer.distribution import probabilities, random_keys, sample_from_probs, uniform
from transformer.sampling import (
    DecodeStep,
    complete,
    generate,
    generate_likeliest,
    generate_rows,
    later_known_mask,
    next_logits,
)
from utils.cli import UserError
from utils.data.masks import region_mask


def make_model(grid: tuple[int, int] = (4, 6), window: int = 0, **options: object) -> GPT:
    return test_kv_cache.make_model(grid, window=window, **options)


def some_indices(grid: tuple[int, int], count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.arange(count) % 4, torch.randint(11, (count, *grid), generator=generator)


# --- filters ------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
]


def reference(logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """The same in plain Python: sort, cut, renormalise."""
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(0).tolist()
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    if top_k:
        order = order[:top_k]
    total = sum(weights[index] for index in order)
    kept, reached = [], 0.0
    for index in order:
        if kept and reached >= top_p:
            break
        kept.append(index)
        reached += weights[index] / total
    total = sum(weights[index] for index in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("settings", SETTINGS)
def test_probabilities_against_the_reference(settings: dict) -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)) * 2
    result = probabilities(logits, SamplingParams(**settings))
    expected = torch.tensor([reference(line, **settings) for line in logits.tolist()])
    torch.testing.assert_close(result, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert probabilities(
        torch.tensor([[1.0, 3.0, 2.0]]), SamplingParams(temperature=0)
    ).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_distribution(settings: dict) -> None:
    """Chi-square on 50,000 draws; what has no probability never comes."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    distribution = probabilities(logits, SamplingParams(**settings))
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(4))
    sampled = sample_from_probs(distribution.expand(50_000, -1), uniform)
    counts = torch.bincount(sampled, minlength=12)
    possible = distribution > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = distribution[possible].double() * 50_000
        expected *= counts.sum() / expected.sum()
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_the_ends_of_the_unit_interval() -> None:
    distribution = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(2, -1)
    nearly_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert sample_from_probs(
        distribution, torch.stack([torch.tensor(0.0), nearly_one])
    ).tolist() == [1, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}),
        *({"top_k": -1}, {"top_p": 0}, {"top_p": 2}, {"min_p": math.nan}),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("scale", [-1, math.nan, math.inf])
def test_guidance_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance_scale"):
        SamplingParams(guidance_scale=scale)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-38, 1e-40, 1e-300])
def test_no_temperature_is_too_low(temperature: float) -> None:
    """Logits over a tiny number are infinite: the distribution was no number, the index none."""
    logits = torch.tensor([[-300.0, 300.0, 299.0], [0.0, 0.0, -1.0]])
    result = probabilities(logits, SamplingParams(temperature=temperature))
    assert result[0].tolist() == [0, 1, 0]
    assert result[1, 2] == 0
    assert result.sum(dim=1).tolist() == [1, 1]


def test_min_p_comes_last() -> None:
    """It came before top-p, whose share then counted from what min-p had left."""
    logits = torch.tensor([0.45, 0.2, 0.15, 0.12, 0.08]).log()
    # The nucleus of 0.75 is the first three of all; of the first four by min-p it is two.
    kept = probabilities(logits, SamplingParams(top_p=0.75, min_p=0.25))
    expected = torch.tensor([0.45, 0.2, 0.15, 0, 0])
    torch.testing.assert_close(kept, expected / expected.sum())


def test_min_p_keeps_what_is_likely_enough() -> None:
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    kept = probabilities(logits, SamplingParams(min_p=0.45))
    torch.testing.assert_close(kept, torch.tensor([2 / 3, 1 / 3, 0, 0]))
    torch.testing.assert_close(probabilities(logits, SamplingParams(min_p=0.0)), logits.exp())
    assert torch.equal(
        probabilities(logits, SamplingParams(min_p=1.0)), torch.tensor([1.0, 0, 0, 0])
    )
    with pytest.raises(ValueError, match="min_p"):
        probabilities(logits, SamplingParams(min_p=1.1))


# --- random numbers -----------------------------------------------------------------------------

IMAGES = torch.arange(2000)


def noise(seed: int, images: Tensor, token: Tensor | int) -> Tensor:
    return uniform(random_keys(seed, images), token)


def numbers(seed: int = 0, tokens: int = 25) -> torch.Tensor:
    return torch.stack([noise(seed, IMAGES, token) for token in range(tokens)], dim=1)


def test_they_are_uniform_in_the_unit_interval() -> None:
    for seed in (0, 1, -1, 12345, 2**64 - 1):
        sampled = numbers(seed)
        assert sampled.dtype == torch.float32
        assert 0 <= sampled.min() < 1e-3
        assert 1 - 1e-3 < sampled.max() < 1
        assert stats.kstest(sampled.flatten().double(), "uniform").pvalue > 1e-3


def test_neighbours_know_nothing_of_each_other() -> None:
    """Tokens, images and seeds that lie side by side; 50,000 pairs have |r| < 0.02 by chance."""
    sampled = numbers()
    for one, other in (
        (sampled[:, :-1], sampled[:, 1:]),
        (sampled[:-1], sampled[1:]),
        (sampled, numbers(seed=1)),
        (sampled[:-1], numbers(seed=1)[1:]),
    ):
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02
        assert (one == other).float().mean() < 1e-4


def test_they_do_not_depend_on_what_is_sampled_beside_them() -> None:
    chosen = torch.tensor([1999, 3, 77])
    assert torch.equal(noise(5, chosen, 11), noise(5, IMAGES, 11)[chosen])
    assert torch.equal(noise(5, chosen, 10**9), noise(5, chosen, 10**9))
    assert not torch.equal(noise(5, chosen, 10**9), noise(5, chosen, 10**9 + 1))


def test_a_token_in_a_tensor_is_the_same() -> None:
    for token in (0, 11, 10**9):
        number = torch.tensor([token])
        assert torch.equal(noise(5, IMAGES, number), noise(5, IMAGES, token))


def test_they_are_what_they_were() -> None:
    """The same seed draws the same images in every version."""
    first = uniform(random_keys(1, torch.arange(3)), 2)
    assert first.tolist() == [0.43828386068344116, 0.045256972312927246, 0.04596984386444092]


# --- grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 2])
def test_same_seed_same_images_at_any_batch_size(window: int) -> None:
    model = make_model(window=window)
    prefix = torch.arange(10) % 4
    whole = generate(model, prefix, seed=5, batch_size=10)
    assert whole.shape == (10, 4, 6)
    assert generate(model, prefix, seed=5, batch_size=3).equal(whole)
    assert not generate(model, prefix, seed=6, batch_size=10).equal(whole)


def test_greedy_images_are_the_models_own_choice() -> None:
    """At temperature 0 every index is the uncached model's likeliest, given those before."""
    model = make_model(window=3)
    prefix = torch.tensor([0, 1, 2, 3])
    indices = generate(model, prefix, params=SamplingParams(temperature=0))
    assert model.logits(prefix, indices).argmax(dim=-1).equal(indices.flatten(1))


def test_guidance() -> None:
    model, prefix = make_model(), torch.arange(4)

    def sample(**params: object) -> Tensor:
        return generate(model, prefix, params=SamplingParams(**params))

    plain = generate(model, prefix)
    assert torch.equal(sample(guidance_schedule="linear"), plain)
    # A scale of 0 is the model without classes, and 1 + 1e-9 goes through both passes.
    none = generate(model, torch.full_like(prefix, model.config.num_classes))
    assert torch.equal(sample(guidance_scale=0.0), none)
    assert torch.equal(sample(guidance_scale=1 + 1e-9), plain)
    assert not torch.equal(sample(guidance_scale=3.0), plain)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"depth": 2}], ids=str)
def test_a_guide_takes_the_place_of_the_model_without_classes(options: dict) -> None:
    model, prefix = make_model(**options), torch.arange(5) % 4
    guide = make_model(num_layers=1, positions="learned", **options)

    def sample(scale: float, batch_size: int = 64) -> Tensor:
        params = SamplingParams(guidance_scale=scale)
        return generate(model, prefix, params=params, guide=guide, batch_size=batch_size)

    assert torch.equal(sample(1 + 1e-9), generate(model, prefix))
    assert torch.equal(sample(0.0), generate(guide, prefix))
    assert not torch.equal(sample(3.0), generate(model, prefix))
    assert torch.equal(sample(3.0, batch_size=2), sample(3.0))
    params = SamplingParams(guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"the guide has latent_dim \(4, 4\), but the model has"):
        DecodeStep(model, 1, size=(4, 6), params=params, guide=make_model((4, 4), **options))


def test_typical_sampling_keeps_what_is_near_the_expected_information() -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)) * 2
    kept = probabilities(logits, SamplingParams(typical_p=0.5))
    for line, found in zip(logits.double().softmax(dim=1), kept, strict=True):
        entropy = -float((line * line.log()).sum())
        order = sorted(range(12), key=lambda i: abs(-math.log(line[i]) - entropy))
        reached, expected = 0.0, torch.zeros(12)
        for index in order:
            if reached < 0.5:
                expected[index] = line[index]
                reached += float(line[index])
        torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-4, atol=1e-6)


def test_the_likeliest_samples_of_a_class_are_kept() -> None:
    model, prefix, candidates = make_model(), torch.tensor([2, 0, 2, 1]), 3
    best = generate_likeliest(model, prefix, candidates=candidates, batch_size=5)
    repeated = prefix.repeat_interleave(candidates)
    sampled = generate(model, repeated)
    scores = log_likelihood(model, repeated, sampled, torch.ones(4, 6))
    for number in range(4):
        own = (repeated == number).nonzero()[:, 0]
        images = (prefix == number).nonzero()[:, 0]
        expected = own[scores[own].argsort(descending=True)[: len(images)]]
        assert torch.equal(best[images], sampled[expected])


def test_guidance_schedules_begin_at_1_and_end_at_the_scale() -> None:
    for schedule in ("linear", "cosine"):
        params = SamplingParams(guidance_scale=5.0, guidance_schedule=schedule)
        scales = [params.scale_at(position, 9) for position in range(9)]
        assert scales == sorted(scales)
        assert scales[0] == pytest.approx(1)
        assert scales[4] == pytest.approx(3)
        assert scales[8] == pytest.approx(5)
    assert SamplingParams(guidance_scale=5.0).scale_at(0, 9) == 5


@pytest.mark.parametrize("power", [0.5, 1, 2.75])
def test_power_cosine_is_that_of_rar(power: float) -> None:
    """`scale_step` of its generate(), whose progress ends one token before 1."""
    for step in range(16):
        expected = (4 - 1) * (1 - math.cos((step / 16) ** power * math.pi)) / 2 + 1
        scale = {"guidance_scale": 4.0, "guidance_schedule": "cosine", "guidance_power": power}
        assert SamplingParams(**scale).scale_at(step, 17) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_outside_of_the_interval_nothing_is_guided(schedule: str) -> None:
    whole = SamplingParams(guidance_scale=3.0, guidance_schedule=schedule)
    part = replace(whole, guidance_interval=(0.25, 0.5))
    for token in range(9):
        expected = whole.scale_at(token, 9) if 2 <= token <= 4 else 1
        assert part.scale_at(token, 9) == expected
    with pytest.raises(ValueError, match="guidance_interval"):
        SamplingParams(guidance_scale=3.0, guidance_interval=(0.5, 2.0))


def test_guidance_schedules_have_names() -> None:
    with pytest.raises(ValueError, match="guidance_schedule"):
        SamplingParams(guidance_scale=2.0, guidance_schedule="square")


def test_known_tokens_stay_and_the_rest_is_sampled() -> None:
    model = make_model()
    prefix, given = some_indices((4, 6))
    keep = torch.zeros(4, 6, dtype=torch.bool)
    keep[:2] = True
    sampled = generate(model, prefix, known=given, known_mask=keep)
    assert torch.equal(sampled[:, :2], given[:, :2])
    assert not torch.equal(sampled[:, 2:], given[:, 2:])
    everything = generate(model, prefix, known=given, known_mask=torch.ones_like(keep))
    assert torch.equal(everything, given)


def test_rows_come_one_by_one() -> None:
    model = make_model((4, 6), window=3)
    step = DecodeStep(model, 2, size=(1000, 5))
    rows = generate_rows(step, torch.zeros(2, dtype=torch.long), random_keys(0, torch.arange(2)))
    assert next(rows).shape == (2, 5)


# --- known positions ----------------------------------------------------------------------------


def test_sides() -> None:
    assert region_mask("top:0.5", (4, 3)).tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    assert region_mask("right:0.34", (2, 3)).tolist() == [[False, False, True]] * 2
    assert region_mask("left:0.5", (2, 2)).tolist() == [[True, False]] * 2
    assert region_mask("bottom:0.25", (4, 1)).flatten().tolist() == [False, False, False, True]
    center = region_mask("center:0.5", (4, 4))
    assert center.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert torch.equal(region_mask("border:0.5", (4, 4)), ~center)
    for text in ("top", "top:2", "middle:0.5", "left:x", "left:nan"):
        with pytest.raises(UserError, match="neither a picture"):
            region_mask(text, (4, 4))


def test_later_known_positions_come_after_a_sampled_one() -> None:
    assert not later_known_mask(region_mask("top:0.5", (4, 4))).any()
    assert later_known_mask(region_mask("left:0.5", (2, 2))).tolist() == [
        [False, False],
        [True, False],
    ]


def log_likelihood(
    model: GPT,
    prefix: Tensor,
    indices: Tensor,
    counted: Tensor,
    extension: PositionExtension = PositionExtension.EXTRAPOLATE,
) -> Tensor:
    """Sum over `counted` (h, w) of log p(token | tokens before it), (N,), by one forward."""
    with torch.no_grad():
        cache = model.make_cache(len(prefix), tuple(counted.shape), extension)
        logs = at_once(model, prefix, indices, cache).log_softmax(dim=-1)
        logs = logs.gather(2, indices.flatten(1)[:, :, None])[:, :, 0]
    return (logs * counted.flatten().repeat_interleave(model.config.depth)).sum(dim=1).float()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("side", ["left:0.5", "bottom:0.25", "right:0.34"])
@pytest.mark.parametrize("depth", [1, 2])
def test_scores_are_the_models_own_of_the_known_tokens_behind(depth, side, guidance) -> None:
    """Without guidance and params, which are no part of how likely the model finds a token."""
    model = make_model(depth=depth)
    prefix, given = torch.arange(5) % 4, torch.randint(11, (5, 4, 6, 2)[: 3 + (depth > 1)])
    keep, scores = region_mask(side, (4, 6)), torch.zeros(5)
    options = {
        "params": SamplingParams(guidance_scale=guidance, temperature=0.5, top_k=3),
        "batch_size": 2,
    }
    sampled = generate(model, prefix, known=given, known_mask=keep, scores=scores, **options)
    expected = log_likelihood(model, prefix, sampled, later_known_mask(keep))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_scores_of_larger_grids_are_by_the_positions_that_they_are_sampled_with() -> None:
    """They were ranked by other positions, which learned ones do not even have."""
    model = make_model(window=3)
    prefix, given = some_indices((6, 9))
    keep, scores = region_mask("left:0.34", (6, 9)), torch.zeros(3)
    options = {
        "known": given,
        "known_mask": keep,
        "size": (6, 9),
        "position_extension": PositionExtension.INTERPOLATE,
    }
    sampled = generate(model, prefix, scores=scores, **options)
    expected = log_likelihood(
        model, prefix, sampled, later_known_mask(keep), PositionExtension.INTERPOLATE
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    learned = make_model(positions="learned", window=3)
    assert complete(learned, prefix, given, keep, candidates=2).shape == (3, 6, 9)


@pytest.mark.parametrize("side", ["top:0.5", "left:0.5", "right:0.5"])
def test_completions_keep_what_is_given_and_candidates_fit_it_better(side: str) -> None:
    model = make_model()
    prefix, given = some_indices((4, 6), 8)
    keep = region_mask(side, (4, 6))
    one = complete(model, prefix, given, keep)
    many = complete(model, prefix, given, keep, candidates=8, batch_size=5)
    for sampled in (one, many):
        assert torch.equal(sampled[:, keep], given[:, keep])
    if side == "top:0.5":  # nothing to rank by
        assert torch.equal(one, many)
        return
    later = later_known_mask(keep)
    scores = [log_likelihood(model, prefix, sampled, later).sum() for sampled in (one, many)]
    assert scores[1] > scores[0]


def test_what_follows_a_known_token_is_sampled_given_it() -> None:
    model = make_model()
    prefix, given = some_indices((4, 6), 2)
    keep = region_mask("top:0.25", (4, 6))
    one, two = complete(model, prefix, given, keep), generate(model, prefix)
    assert not torch.equal(one[:, 1:], two[:, 1:])


# --- captured graphs ----------------------------------------------------------------------------


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
        ((9, 8), 0, {"positions": "learned"}),
        ((9, 8), 2, {}),
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
    prefix, known = some_indices(size, 5)
    if model.config.depth == 2:
        known = torch.stack([known, known], dim=-1)
    known = {"known": known, "known_mask": region_mask("left:0.34", size)}
    params = SamplingParams(temperature=0.9, top_k=8, top_p=0.95, min_p=0.01, **guidance)
    options = {"size": size, "batch_size": 2, "params": params}
    eager, scores = generate(model, prefix, **options), torch.zeros(2, 5)
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
