"""Random orders: which models of a training count, sampling in any order and in parallel."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests.conftest import TINY_GPT
from tests.test_kv_cache import CONDITIONS, make_model
from tests.test_transformer_generation import call
from transformer import GPT, SamplingParams, make_prefix
from transformer.distribution import random_keys
from transformer.rope import known_first_orders, step_sizes
from transformer.sampling import DecodeStep, complete, generate, sample_classes

GREEDY = SamplingParams(temperature=0)


def test_nothing_counts_before_the_raster_phase(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience could end a training in random orders, whose best model then never saw the raster.

    Here every evaluation is worse than the one before.
    """
    seen = []

    def worse(*arguments: object) -> torch.Tensor:
        seen.append(len(seen) + 1.0)
        return torch.full((2, 2), seen[-1])

    monkeypatch.setattr(train, "evaluate", worse)
    Path("indices.txt").write_text("0 1 2 3\n" * 40)
    flags = ("--path_to_data", "indices.txt", "--device", "cpu", "--output_dir", "gpt", *TINY_GPT)
    steps = ("--max_epochs", 9, "--max_steps", 8, "--evaluate_every", 1, "--patience", 1)
    call("train", *flags, *steps, "--order_anneal", "0.5,0.75")
    lines = [json.loads(line) for line in Path("gpt/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "val/bits_per_token" in line]
    # From step 6 on all is in raster order; step 7 is worse.
    assert steps == list(range(8))
    records = json.loads(Path("gpt/checkpoints/step-00000007/training.json").read_text())
    assert records["progress"]["best"] == seen[6]


def some_masks(grid: tuple[int, int] = (3, 4)) -> torch.Tensor:
    """Four masks of which two have as many known positions."""
    masks = torch.zeros(4, *grid, dtype=torch.bool)
    masks[0, 1:], masks[1, :, 0], masks[2, ::2, 1], masks[3, :, 3] = True, True, True, True
    return masks


def some_input(depth: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (4, 3, 4) if depth == 1 else (4, 3, 4, depth)
    return torch.arange(4) % 3, torch.randint(11, shape, generator=generator)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("depth", [1, 2])
def test_completed_tokens_are_those_of_one_forward_in_the_same_order(depth, positions) -> None:
    """Cached = uncached, with all known tokens as context: before and behind in raster order."""
    model = make_model((3, 4), depth=depth, positions=positions, order_anneal=(1, 1))
    (prefix, given), masks = some_input(depth), some_masks()
    sampled = complete(model, prefix, given, masks, params=GREEDY, batch_size=2)
    assert torch.equal(sampled[masks], given[masks])
    order = known_first_orders(random_keys(0, torch.arange(4)), masks)
    tokens, _ = model.flatten(sampled, order)
    best = model.logits(prefix, sampled, order).argmax(dim=2)
    for image, mask in enumerate(masks):
        first = int(mask.sum()) * depth
        assert torch.equal(best[image, first:], tokens[image, first:])
        assert mask.flatten()[order[image, : first // depth]].all()
    assert len(order.unique(dim=0)) == 4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_tokens_of_one_step_are_each_predicted_from_the_steps_before(guidance: float) -> None:
    """By brute force: for each of them a forward in the order in which it comes next."""
    model = make_model((3, 4), order_anneal=(1, 1))
    params = SamplingParams(temperature=0, steps=5, guidance_scale=guidance)
    prefix, _ = some_input()
    sampled, done = generate(model, prefix, params=params), 0
    nothing, counts = torch.zeros(4, 3, 4).bool(), step_sizes(12, 5)
    order = known_first_orders(random_keys(0, torch.arange(4)), nothing, counts)
    for count in counts:
        for number in range(done, done + count):
            others = [*range(done, number), *range(number + 1, 12)]
            swapped = order[:, [*range(done), number, *others]]
            logits, null = (
                model.logits(x, sampled, swapped)[:, done]
                for x in (prefix, torch.full_like(prefix, model.config.num_classes))
            )
            best = torch.lerp(null, logits, guidance).argmax(dim=1)
            assert torch.equal(best, sampled.flatten(1).gather(1, swapped[:, done, None])[:, 0])
        done += count
    assert done == 12


@pytest.mark.parametrize("known_columns", [0, 3])
def test_tokens_of_one_step_are_apart(known_columns: int) -> None:
    """Random orders put neighbours into one step, which are then sampled independently."""
    masks = torch.zeros(200, 8, 8, dtype=torch.bool)
    masks[:, :, :known_columns] = True
    keys, known = random_keys(0, torch.arange(200)), 8 * known_columns
    counts = step_sizes(64 - known, 12)
    nearest = []
    for order in (known_first_orders(keys, masks, counts), known_first_orders(keys, masks)):
        assert order.sort(dim=1).values.equal(torch.arange(64).expand(200, -1))
        assert masks.flatten(1).gather(1, order[:, :known]).all()
        assert len(order.unique(dim=0)) == 200
        steps = [x for x in order[:, known:].split(counts, dim=1) if x.shape[1] > 1]
        places = [torch.stack([x // 8, x % 8], dim=2).double() for x in steps]
        distances = [torch.cdist(x, x) + torch.eye(x.shape[1]) * 99 for x in places]
        found = torch.cat([x.amin(dim=2).flatten() for x in distances])
        nearest.append(float((found == 1).double().mean()))  # have a neighbour in their step
    assert nearest[0] < 0.5 * nearest[1]


def test_steps_begin_with_one_token_and_sample_ever_more() -> None:
    for count, steps in ((49, 12), (49, 2), (16, 15), (3, 2)):
        sizes = step_sizes(count, steps)
        assert (len(sizes), sum(sizes), sizes[0]) == (steps, count, 1)
        assert min(sizes) == 1
    assert step_sizes(49, 12) == [1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 7, 6]
    assert step_sizes(3, 0) == step_sizes(3, 8) == [1, 1, 1]
    assert step_sizes(0, 4) == []
    assert step_sizes(9, 1) == [1, 8]


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("anneal", [None, (1, 1)])
def test_any_batch_size_samples_the_same_with_a_mask_for_each_image(anneal, steps) -> None:
    model = make_model((3, 4), order_anneal=anneal)
    (prefix, given), masks = some_input(), some_masks()
    options = {"params": SamplingParams(steps=steps if anneal else 0), "seed": 3}
    one, two, all_at_once = (
        complete(model, prefix, given, masks, batch_size=size, **options) for size in (1, 2, 4)
    )
    assert torch.equal(one, two)
    assert torch.equal(one, all_at_once)
    assert torch.equal(one[masks], given[masks])
    assert not torch.equal(one[~masks], given[~masks])
    # As a memory map of more than 256 codes.
    options |= {"known": given, "known_mask": masks, "out": given.to(torch.uint16)}
    assert torch.equal(generate(model, prefix, **options).long(), one)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_class_is_sampled_by_its_probability_given_the_known_tokens(depth: int) -> None:
    """Beside Bayes' rule on the likelihoods of whole grids, whose other tokens come later."""
    count, model = 3000, make_model((3, 4), depth=depth, order_anneal=(1, 1))
    model.head.weight.data.mul_(8)  # so that the classes differ
    shape, mask = model.config.grid_shape((3, 4)), some_masks()[1]
    given = some_input(depth)[1][:1].expand(count, *shape)
    keys, none = random_keys(0, torch.arange(count)), torch.full((count,), 3)
    order = known_first_orders(keys, mask.expand(count, 3, 4))[:1].expand(count, -1)
    known = 3 * depth
    nats = [
        model.loss(torch.full((1,), c), given[:1], order[:1])[:, :known].sum() for c in range(3)
    ]
    posterior = (-torch.stack(nats)).softmax(dim=0)
    tokens = model.flatten(given, order)[0][:, :known]
    order = model.grid.with_depths(order)[:, :known]
    step = DecodeStep(model, count, size=(3, 4))
    with torch.no_grad():
        prefix, log_posterior = sample_classes(step, none, keys, tokens, order)
    assert torch.allclose(log_posterior.exp(), posterior[prefix].float(), atol=1e-5)
    shares = torch.bincount(prefix, minlength=3) / count
    assert (shares - posterior).abs().max() < 4 * (0.25 / count) ** 0.5
    assert 0.5 < posterior.max() < 0.95  # or the test would see nothing
    assert torch.equal(none, torch.full((count,), 3))  # not changed


@pytest.mark.parametrize(("length", "guidance"), [(1, 1.0), (1, 2.0), (5, 2.0)])
def test_completions_without_a_class_are_those_of_the_sampled_class(length, guidance) -> None:
    model = make_model((3, 4), prefix=length, order_anneal=(1, 1))
    (_, given), masks = some_input(), some_masks()
    condition = torch.full((4, 2, 2), CONDITIONS) if length > 1 else None  # "not given"
    options = {"known": given, "known_mask": masks, "batch_size": 3}
    options |= {"params": SamplingParams(guidance_scale=guidance), "seed": 7}
    scores, others = torch.zeros(4), torch.zeros(3, 4)
    sampled = generate(
        model, make_prefix(torch.tensor([3, 3, 1, 3]), condition), scores=scores, **options
    )
    by_class = [
        generate(
            model,
            make_prefix(torch.full((4,), number), condition),
            scores=others[number],
            **options,
        )
        for number in range(3)
    ]
    assert torch.equal(sampled[2], by_class[1][2])
    assert scores[2] == pytest.approx(others[1, 2])
    for image in (0, 1, 3):
        same = [c for c in range(3) if torch.equal(sampled[image], by_class[c][image])]
        # The score of a sampled class includes its own log-probability.
        assert any(scores[image] < others[c, image] for c in same)


def test_where_a_condition_is_given_no_class_is_sampled() -> None:
    """p(class | condition, tokens) would take the priors p(class | condition)."""
    model, keys = make_model((3, 4), prefix=5, order_anneal=(1, 1)), torch.arange(4)
    condition = torch.full((4, 2, 2), CONDITIONS)
    condition[1, 0, 0] = 2
    prefix, tokens = make_prefix(torch.full((4,), 3), condition), torch.arange(12).view(4, 3) % 11
    step = DecodeStep(model, 4, size=(3, 4))
    with torch.no_grad():
        found, log_posterior = sample_classes(step, prefix, keys, tokens, tokens)
    assert (found[:, 0] == 3).tolist() == [False, True, False, False]
    assert (log_posterior == 0).tolist() == [False, True, False, False]
    assert torch.equal(found[:, 1:], prefix[:, 1:])


def test_with_nothing_known_no_class_is_sampled() -> None:
    model = make_model((3, 4), order_anneal=(1, 1))
    nothing = {"known": some_input()[1], "known_mask": torch.zeros(3, 4, dtype=torch.bool)}
    none = torch.full((4,), 3)
    assert torch.equal(generate(model, none, **nothing), generate(model, none))


def test_a_gpt_of_any_order_samples_in_random_orders() -> None:
    """It hardly saw raster order, which is one of many."""
    prefix, _ = some_input()
    model = make_model((3, 4), order_anneal=(1, 1))
    sampled = generate(model, prefix, seed=2)
    assert torch.equal(sampled, generate(model, prefix, seed=2, params=SamplingParams(steps=12)))
    raster = make_model((3, 4), order_anneal=(0.5, 1))  # of the same weights
    assert not torch.equal(sampled, generate(raster, prefix, seed=2))


def test_only_a_gpt_of_any_order_decodes_in_parallel() -> None:
    (prefix, given), masks, params = some_input(), some_masks(), SamplingParams(steps=4)
    for model in (make_model((3, 4)), make_model((3, 4), order_anneal=(0.5, 0.75))):
        with pytest.raises(ValueError, match="needs a GPT trained in random orders"):
            generate(model, prefix, params=params)
    able: GPT = make_model((3, 4), order_anneal=(1, 1))
    options = {"guide": make_model((3, 4)), "params": SamplingParams(guidance_scale=2)}
    with pytest.raises(ValueError, match="the guide has any_order False"):
        complete(able, prefix, given, masks, **options)


def test_all_evaluations_count_where_all_orders_are_random_to_the_end(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "evaluate", lambda *_: torch.full((2, 2), 1.0))
    Path("indices.txt").write_text("0 1 2 3\n" * 40)
    flags = ("--path_to_data", "indices.txt", "--device", "cpu", "--output_dir", "gpt", *TINY_GPT)
    steps = ("--max_steps", 8, "--evaluate_every", 1, "--patience", 2)
    call("train", *flags, *steps, "--order_anneal", "1,1")
    lines = [json.loads(line) for line in Path("gpt/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "val/bits_per_token" in x] == list(range(4))
