"""Fine-tuning: a GPT that starts from the weights of another; frozen weights, low-rank updates."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from transformer.config import FineTuningConfig, GPTConfig
from transformer.gpt import GPT
from transformer.layers import LoRALinear
from transformer.rope import GridPositions, PositionExtension, resize_embeddings

# What may differ from the GPT that a training starts from, beside the classes and the grid.
FREE = {"latent_dim", "dropout", "label_smoothing", "window_size", "order_anneal"}
FREE |= {"caption_length", "text_weight"}
TOKENS = ("token_embedding", "head")  # what depends on the tokenizer


def config_from(
    source: GPTConfig, given: Mapping[str, Any], data: Mapping[str, Any], tuning: FineTuningConfig
) -> GPTConfig:
    """The config of a GPT that starts from one of `source`; a ValueError for a contradiction.

    `given` are fields that the user sets, `data` those that follow from the data.
    """
    settings = asdict(source) | {"label_smoothing": 0.0, "start_from_codebook": False}
    if source.order_anneal and not source.any_order:
        settings["order_anneal"] = (0.0, 0.0)  # raster order, in which its training ended
    free = FREE | ({"start_from_codebook"} if tuning.reset_embeddings else set())
    for name in sorted(given.keys() - free):
        if given[name] != settings[name] and not name.endswith("_dropout"):
            raise ValueError(
                f"{name} {given[name]} contradicts {tuning.init_from}, where it is "
                f"{settings[name]}; leave it out"
            )
    config = GPTConfig(**settings | dict(given) | dict(data))
    if tuning.grid_positions == "interpolate":
        sizes = zip(source.position_scale, source.latent_dim, config.latent_dim, strict=True)
        scale = tuple(scale * (before / now) for scale, before, now in sizes)
        config = GPTConfig(**asdict(config) | {"position_scale": scale})
    return config


def start_from(
    model: GPT, source: GPT, classes: Sequence[int | None], tuning: FineTuningConfig
) -> None:
    """Copy the weights of `source` into a new model, and limit what is trained.

    `classes` has the class of the source for each class of the model, None for a new class, which
    starts as a class of the source that is dropped, or else as "no class". `TOKENS` and condition
    start anew with `reset_embeddings`. A ValueError if weights do not fit or `freeze` names none.
    """
    own, state, none = model.state_dict(), source.state_dict(), source.config.num_classes
    gone = iter(sorted({*range(none)} - {*classes}))
    rows = [next(gone, none) if number is None else number for number in classes]
    state["prefix_embedding.weight"] = state["prefix_embedding.weight"][[*rows, none]]
    for name in state.keys() & own.keys() & {"position_embedding", "target_embedding.weight"}:
        before, now = (x.prefix_length * (name == "position_embedding") for x in (source, model))
        kept, table = state[name][: min(before, now)], state[name][before:]
        if tuning.grid_positions == "interpolate":
            table = resize_embeddings(table, source.grid.size, model.grid.size)
        else:
            sizes = model.grid.size, source.grid.size
            grid = GridPositions(*sizes, extension=PositionExtension.EXTRAPOLATE)
            table = grid.embed(grid.raster(), table)
        state[name] = torch.cat([kept, own[name][before:now], table])  # a prefix may be longer
    anew = (*TOKENS, "condition_embedding") if tuning.reset_embeddings else ()
    for name, weight in state.items():
        if name not in own or name.startswith(anew):
            continue
        if own[name].shape != weight.shape:
            shapes = f"{tuple(weight.shape)} in the first and {tuple(own[name].shape)} in the other"
            raise ValueError(f"the weights of this GPT do not fit the other: {name} is {shapes}")
        own[name] = weight
    model.load_state_dict(own)
    if tuning.lora_rank:
        _add_updates(model, tuning)
    _freeze(model, tuning.freeze)


def _add_updates(model: GPT, tuning: FineTuningConfig) -> None:
    """Train low-rank updates of the blocks, and embeddings of the prefix and a new tokenizer."""
    trained = [part.layer for part in model.config.prefix_parts]
    trained += TOKENS if tuning.reset_embeddings else ()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(tuple(trained)))
    for block in model.blocks:
        for layer in (block.attention, block.feed_forward):
            for name, linear in [*layer.named_children()]:
                setattr(layer, name, LoRALinear(linear, tuning.lora_rank))


def _freeze(model: GPT, names: str) -> None:
    parameters = dict(model.named_parameters())
    for name in filter(None, names.split(",")):
        found = [key for key in parameters if f"{key}.".startswith(f"{name}.")]
        if not found:
            known = ", ".join(dict.fromkeys(key.partition(".")[0] for key in parameters))
            raise ValueError(
                f"freeze {name}: this GPT has no weights of that name; names begin with {known}, "
                "those of a block with blocks.0"
            )
        for key in found:
            parameters[key].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze {names} leaves nothing to train")
