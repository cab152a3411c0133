"""What other projects' config files say of a tokenizer, as settings of `VQVAEConfig`, and back."""

from collections.abc import Mapping
from typing import Any

from vqvae import VQVAEConfig

# What every VQModel that can be read has.
DIFFUSERS = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_type": "group",
}
# Which taming's classes ask for.
NO_LOSS = "taming.modules.losses.vqperceptual.DummyLoss"
GUMBEL_TEMPERATURE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {
        "warm_up_steps": 0,
        "max_decay_steps": 1000001,
        "lr_start": 0.9,
        "lr_max": 0.9,
        "lr_min": 1e-6,
    },
}


def read_taming(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from taming's configs/*.yaml, or from a GPT's, which holds its tokenizer's.

    Raises:
        ValueError: it describes no such tokenizer.
    """
    try:
        params = content["model"]["params"]
        params = params.get("first_stage_config", {}).get("params", params)
        network, side = params["ddconfig"], params["ddconfig"]["resolution"]
        levels = range(len(network["ch_mult"]))
        found = {
            "image_size": (side, side),
            "in_channels": network["in_channels"],
            "channels": network["ch"],
            "channel_multipliers": tuple(network["ch_mult"]),
            "num_res_blocks": network["num_res_blocks"],
            "attention_levels": tuple(
                i for i in levels if side >> i in network["attn_resolutions"]
            ),
            "z_channels": network["z_channels"],
            "dropout": float(network.get("dropout", 0.0)),
            "codebook_size": params["n_embed"],
            "codebook_dim": params["embed_dim"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no config of a taming VQGAN: {error!r}") from error
    if "kl_weight" in params:
        found |= {"quantizer": "gumbel", "entropy_weight": float(params["kl_weight"])}
    return found


def read_diffusers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from the config.json of diffusers.

    Raises:
        ValueError: it describes no `VQModel`, or one that is built in another way.
    """
    for name, needed in DIFFUSERS.items():
        if content.get(name, needed) != needed:
            raise ValueError(f"{name} is {content[name]!r}, but only {needed!r} can be read")
    try:
        return _settings(content)
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"it is no config of a diffusers VQModel: {error!r:.200}") from error


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    size = content.get("sample_size", 256)
    height, width = (size, size) if isinstance(size, int) else size
    found: dict[str, Any] = {"image_size": (int(height), int(width))}
    for ours, theirs in (
        ("in_channels", "in_channels"),
        ("num_res_blocks", "layers_per_block"),
        ("mid_attention", "mid_block_add_attention"),
        ("z_channels", "latent_channels"),
        ("codebook_size", "num_vq_embeddings"),
        ("codebook_dim", "vq_embed_dim"),
    ):
        if content.get(theirs) is not None:
            found[ours] = content[theirs]
    widths, kinds = content.get("block_out_channels"), content.get("down_block_types")
    if widths:
        found["channels"] = widths[0]
        found["channel_multipliers"] = tuple(width // widths[0] for width in widths)
    if kinds:
        levels = (i for i, kind in enumerate(kinds) if kind.startswith("Attn"))
        found["attention_levels"] = tuple(levels)
    return found


def write_diffusers(config: VQVAEConfig) -> dict[str, object]:
    """What diffusers' config.json says of such a tokenizer."""
    kinds = [
        "Attn" * (i in config.attention_levels) for i in range(len(config.channel_multipliers))
    ]
    return DIFFUSERS | {
        "block_out_channels": [config.channels * m for m in config.channel_multipliers],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "num_vq_embeddings": config.codebook_size,
        "sample_size": config.image_size[0],  # a whole number there
        "vq_embed_dim": config.codebook_dim,
    }


def write_taming(config: VQVAEConfig) -> dict[str, Any]:
    """What taming's configs/*.yaml says of such a tokenizer; losses and data are left out."""
    side = max(config.image_size)  # of the square that it speaks of
    network = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": side,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [side >> level for level in config.attention_levels],
        "dropout": config.dropout,
    }
    params: dict[str, Any] = {"embed_dim": config.codebook_dim, "n_embed": config.codebook_size}
    if config.quantizer == "gumbel":
        params["kl_weight"] = config.quantizer_options.entropy_weight
        params["temperature_scheduler_config"] = GUMBEL_TEMPERATURE
    names = {"gumbel": "GumbelVQ", "ema": "EMAVQ"}
    name = names.get(config.quantizer, "VQModel")
    params |= {"ddconfig": network, "lossconfig": {"target": NO_LOSS}}
    return {"model": {"target": f"taming.models.vqgan.{name}", "params": params}}


READERS = {"taming": read_taming, "diffusers": read_diffusers}
