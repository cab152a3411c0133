"""How other projects name the parts of the network that `VQVAE` is, and their weights as ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vqvae import VQVAE, VQVAEConfig


@dataclass(frozen=True)
class Layout:
    """Names in another project's state dict, under `encoder.` and `decoder.` unless they are full.

    Attributes:
        down, up: a level of the encoder and of the decoder.
        top_first: whether level 0 of the decoder is that of the highest resolution.
        block, attn: within a level; downsample, upsample: its last part.
        mid: first block, attention, second block.
        norm_out: the last GroupNorm.
        leaves: names within a block or an attention, by ours, where they differ.
        quantizers: ours that it can hold; the first where the names do not tell.
        commitment_cost: weight of the encoder's term in its trainings.
        ignored: full names that hold no part of the model.
        averages: of `ema`, full names of the moving averages: how many vectors, and their sums.
        buffers: what the other project expects beside the weights, of which nothing depends: the
            length of zeros by name.
    """

    down: str
    up: str
    block: str
    mid: tuple[str, str, str]
    attn: str = "attn"
    downsample: str = "downsample"
    upsample: str = "upsample"
    norm_out: str = "norm_out"
    top_first: bool = False
    leaves: Mapping[str, str] = field(default_factory=dict)
    quantizers: tuple[str, ...] = ("vq",)
    commitment_cost: float = 0.25
    ignored: tuple[str, ...] = ()
    averages: tuple[str, ...] = ()
    buffers: Mapping[str, int] = field(default_factory=dict)

    def modules(self, config: VQVAEConfig) -> dict[str, str]:
        """Full name of each module in the other project, by its name in `VQVAE`."""
        names = {
            "encoder.quant_conv": "quant_conv",
            "decoder.post_quant_conv": "post_quant_conv",
            "quantizer.embedding": "quantize.embedding",
        }
        if config.quantizer == "gumbel":
            names |= {"quantizer.embedding": "quantize.embed", "quantizer.proj": "quantize.proj"}
        middle = list(self.mid) if config.mid_attention else [self.mid[0], self.mid[2]]
        last = len(config.channel_multipliers) - 1
        for side, own, level_name, change in (
            ("encoder", "down", self.down, self.downsample),
            ("decoder", "up", self.up, self.upsample),
        ):
            names |= {f"{side}.{part}": f"{side}.{part}" for part in ("conv_in", "conv_out")}
            names[f"{side}.norm_out"] = f"{side}.{self.norm_out}"
            for number, part in enumerate(middle):
                names[f"{side}.mid.{number}"] = f"{side}.{part}"
            for level in range(last + 1):
                ours = f"{side}.{own}.{level}"
                flipped = side == "decoder" and self.top_first
                theirs = f"{side}.{level_name}.{last - level if flipped else level}"
                names[f"{ours}.resample"] = f"{theirs}.{change}"
                for number in range(config.num_res_blocks + (side == "decoder")):
                    names[f"{ours}.block.{number}"] = f"{theirs}.{self.block}.{number}"
                    names[f"{ours}.attn.{number}"] = f"{theirs}.{self.attn}.{number}"
        return names

    def keys(self, config: VQVAEConfig) -> dict[str, str]:
        """Their name of every weight of a `VQVAE`, by ours."""
        with torch.device("meta"):
            ours = VQVAE(config).state_dict()
        modules, found = self.modules(config), {}
        for key in ours:
            parts = key.split(".")
            for cut in range(len(parts) - 1, 0, -1):
                module, leaf = ".".join(parts[:cut]), parts[cut:]
                if module in modules:
                    leaf[0] = self.leaves.get(leaf[0], leaf[0])
                    found[key] = ".".join([modules[module], *leaf])
                    break
        if config.quantizer == "ema" and self.averages:
            found |= dict(zip(("quantizer.counts", "quantizer.sums"), self.averages, strict=True))
        return found

    def read_config(
        self, state: Mapping[str, Tensor], image_size: tuple[int, int], quantizer: str
    ) -> VQVAEConfig:
        """The architecture that names and shapes of a state dict tell.

        Raises:
            KeyError: it is none of this layout.
            ValueError: it is one that `VQVAE` cannot be.
        """
        level = f"encoder.{self.down}"
        count = sum(f"{level}.{i}.{self.block}.0.conv1.weight" in state for i in range(32))
        blocks = sum(f"{level}.0.{self.block}.{j}.conv1.weight" in state for j in range(32))
        widths = [len(state[f"{level}.{i}.{self.block}.0.conv2.weight"]) for i in range(count)]
        channels, in_channels = state["encoder.conv_in.weight"].shape[:2]
        if not widths:
            raise KeyError(f"{level}.0")
        if any(width % channels for width in widths):
            raise ValueError(f"levels of widths {widths} are no multiples of the first {channels}")
        attention = self.leaves.get("norm", "norm")
        if "quantize.proj.weight" in state:
            quantizer = "gumbel"
        elif self.averages and self.averages[0] in state:
            quantizer = "ema"
        codes = state["quantize.embed.weight" if quantizer == "gumbel" else EMBEDDING]
        beta = 0.25 if quantizer == "ema" else self.commitment_cost
        unused = quantizer == "gumbel"  # it has no such term
        return VQVAEConfig.create(
            image_size=image_size,
            in_channels=in_channels,
            patch_size=1,
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_res_blocks=blocks,
            attention_levels=tuple(
                i for i in range(count) if f"{level}.{i}.{self.attn}.0.{attention}.weight" in state
            ),
            mid_blocks=2,
            mid_attention=f"encoder.{self.mid[1]}.{attention}.weight" in state,
            z_channels=len(state["encoder.conv_out.weight"]),
            quantizer=quantizer,
            codebook_size=len(codes),
            codebook_dim=codes.shape[1],
            **({} if unused else {"commitment_cost": beta}),
        )


EMBEDDING = "quantize.embedding.weight"
# Their legacy quantizers put beta on the codebook's term, and nothing on the encoder's. (The scale
# of the codebook's makes no difference to Adam, as no other term moves the codes.)
LEGACY = 1.0

NAMES_SHOWN = 5
# Settings that no weight tells.
UNTOLD = ("dropout", "entropy_weight")

LAYOUTS = {
    # github.com/CompVis/taming-transformers, taming/modules/diffusionmodules/model.py
    "taming": Layout(
        down="down",
        up="up",
        top_first=True,
        block="block",
        mid=("mid.block_1", "mid.attn_1", "mid.block_2"),
        quantizers=("vq", "ema", "gumbel"),
        commitment_cost=LEGACY,
        ignored=("loss.", "model_ema.", "quantize.used"),
        averages=("quantize.embedding.cluster_size", "quantize.embedding.embed_avg"),
    ),
    # github.com/FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py
    "llamagen": Layout(
        down="conv_blocks",
        up="conv_blocks",
        block="res",
        mid=("mid.0", "mid.1", "mid.2"),
        quantizers=("cosine",),
        ignored=("quantize.codebook_used",),
        buffers={"quantize.codebook_used": 65536},
    ),
    # github.com/huggingface/diffusers, models/autoencoders/vq_model.py
    "diffusers": Layout(
        down="down_blocks",
        up="up_blocks",
        block="resnets",
        attn="attentions",
        downsample="downsamplers.0",
        upsample="upsamplers.0",
        mid=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        norm_out="conv_norm_out",
        leaves={
            "nin_shortcut": "conv_shortcut",
            "norm": "group_norm",
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "proj_out": "to_out.0",
        },
        quantizers=("vq", "ema"),
        commitment_cost=LEGACY,
    ),
}


# Of whole models, or of a wrapper, in whose state dict the tokenizer's lies among others.
PREFIXES = ("module.", "_orig_mod.", "first_stage_model.")
FIRST = "encoder.conv_in.weight"


def from_other(
    name: str,
    state: Mapping[str, Tensor],
    image_size: tuple[int, int],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[VQVAE, list[str]]:
    """A `VQVAE` with the weights of another project's, and the names that were ignored.

    Args:
        name: of `LAYOUTS`.
        state: its state dict, not nested; the names may have one of `PREFIXES`.
        image_size: height and width, which no weight tells.
        settings: what a config file says: of `UNTOLD` it counts, the rest must agree.

    Raises:
        ValueError: names that are missing or unknown, a network that `VQVAE` cannot be, or other
            settings than those of the weights.
    """
    layout = LAYOUTS[name]
    prefix = next((one for one in PREFIXES if one + FIRST in state and FIRST not in state), "")
    outside = [key for key in state if not key.startswith(prefix)]
    state = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    try:
        config = layout.read_config(state, image_size, layout.quantizers[0])
    except KeyError as error:
        raise ValueError(f"it is no tokenizer of {name}: it has no {error}") from error
    for setting, value in settings.items():
        told = config.to_dict().get(setting)
        if setting not in UNTOLD and value != told:
            raise ValueError(f"{setting} is {told} by its weights, but {value} by its config")
    untold = {setting: settings[setting] for setting in UNTOLD if setting in settings}
    config = VQVAEConfig.create(**config.to_dict() | untold)
    keys = layout.keys(config)
    ignored = [key for key in state if key.startswith(layout.ignored)] if layout.ignored else []
    missing = sorted(set(keys.values()) - set(state))
    unknown = sorted(set(state) - set(keys.values()) - set(ignored))
    if missing or unknown:
        raise ValueError(
            f"names that are missing: {_some(missing)}; names that are unknown: {_some(unknown)}"
        )
    model = VQVAE(config)
    own = model.state_dict()
    for ours, theirs in keys.items():
        own[ours] = _shaped(state[theirs], own[ours].shape, theirs)
    if "quantizer.initialised" in own:
        own["quantizer.initialised"] = torch.tensor(True)
    model.load_state_dict(own)
    return model.eval(), outside + ignored


def to_other(name: str, model: VQVAE) -> dict[str, Tensor]:
    """The weights of a `VQVAE` under another project's names.

    Raises:
        ValueError: the other project has no such network.
    """
    layout, config = LAYOUTS[name], model.config
    last = len(config.channel_multipliers) - 1
    for right, what in (
        (config.quantizer in layout.quantizers, f"the quantizer {config.quantizer}"),
        (config.patch_size == 1, "a patch_size above 1"),
        (config.z_channels > 0, "no quant_conv (z_channels 0)"),
        (config.mid_blocks == 2, "other than 2 mid_blocks"),
        (config.mid_attention or name == "diffusers", "no mid_attention"),
        (name != "diffusers" or config.channel_multipliers[0] == 1, "a first multiplier above 1"),
        (config.channels % 32 == 0, "channels in other than 32 groups"),
        (name != "llamagen" or config.attention_levels == (last,), "attention at other levels"),
        (name != "llamagen" or config.channels == 128, "other than 128 channels"),
        (name != "llamagen" or config.num_res_blocks == 2, "other than 2 num_res_blocks"),
        (name != "llamagen" or config.in_channels == 3, "other than 3 in_channels"),
    ):
        if not right:
            raise ValueError(f"{name} has no tokenizer with {what}")
    state = {}
    for ours, theirs in layout.keys(config).items():
        weight = model.state_dict()[ours]
        if name == "diffusers" and ".attentions." in theirs and weight.dim() == 4:
            weight = weight[:, :, 0, 0]  # they are no convolutions there, but Linear
        if theirs == "quantize.proj.weight":
            weight = weight[:, :, None, None]
        state[theirs] = weight.contiguous()
    return state | {name: torch.zeros(length) for name, length in layout.buffers.items()}


def _some(names: list[str]) -> str:
    """The first names, and how many there are."""
    rest = len(names) - NAMES_SHOWN
    return (", ".join(names[:NAMES_SHOWN]) or "none") + (f" and {rest} more" if rest > 0 else "")


def _shaped(weight: Tensor, shape: torch.Size, name: str) -> Tensor:
    """The weight in this shape, which may differ by the 1x1 of a convolution."""
    if weight.squeeze().shape != torch.empty(shape, device="meta").squeeze().shape:
        raise ValueError(f"{name} has the shape {tuple(weight.shape)}, not {tuple(shape)}")
    return weight.reshape(shape)
