"""Weights of taming-transformers, LlamaGen and diffusers as those of a `VQVAE`, and back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.config import VQVAEConfig
from vqvae.model import VQVAE

VQ = {"quantizer.embedding.weight": "quantize.embedding.weight"}
EMA = {
    "quantizer.counts": "quantize.embedding.cluster_size",
    "quantizer.sums": "quantize.embedding.embed_avg",
}
GUMBEL = {
    "quantizer.embedding.weight": "quantize.embed.weight",
    "quantizer.proj.weight": "quantize.proj.weight",
    "quantizer.proj.bias": "quantize.proj.bias",
}


@dataclass(frozen=True)
class Format:
    """How another project stores the network that `VQVAE` is."""

    keys: dict[str, str]  # parts of our keys, as regular expressions, and what they are there
    # Quantizers with their keys of the weights by ours. Without a setting, the first that fits.
    quantizers: Mapping[str, Mapping[str, str]]
    # Settings that its class cannot vary, beside `FIXED`.
    required: Mapping[str, Any] = field(default_factory=dict)
    # Weight of the encoder's loss term in its trainings. Legacy quantizers apply beta to the
    # codebook's term, and weight 1 to the encoder's. (The scale of the codebook's term has no
    # effect with Adam, as no other term moves the codes.)
    commitment_cost: float = 1.0
    decoder_from_top: bool = False  # decoder level 0 is that of the highest resolution
    ignored: tuple[str, ...] = ()  # beginnings of keys that are not part of the model
    buffers: Mapping[str, int] = field(default_factory=dict)  # that it expects: length of zeros
    nest: str = "state_dict"  # key of the state dict in the files that are written

    def key(self, ours: str, levels: int = 0) -> str:
        """Their key of a weight; `levels` is the number of levels, for those of the decoder."""
        if self.decoder_from_top:
            ours = re.sub(r"\bup\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", ours)
        for pattern, replacement in (QUANT_CONV | self.keys).items():
            ours = re.sub(pattern, replacement, ours)
        return ours

    def all_keys(self, config: VQVAEConfig) -> dict[str, str]:
        """Their key of every weight of a `VQVAE`, by ours."""
        with torch.device("meta"):
            ours = [key for key in VQVAE(config).state_dict() if not key.startswith("quantizer.")]
        # Without attention the second block is mid.1 here, but keeps its number elsewhere.
        mid = ".mid.1." if config.mid_attention else ".mid.2."
        levels = len(config.channel_multipliers)
        theirs = {key: self.key(key.replace(".mid.1.", mid), levels) for key in ours}
        return {**theirs, **self.quantizers[config.quantizer]}


IBQ = {"similarity": "inner_product", "softmax_temperature": 1.0}
# What all of them share.
FIXED = {"patch_size": 1, "mid_blocks": 2, "channels_per_group": 0}
QUANT_CONV = {r"^encoder\.quant_conv": "quant_conv", r"^decoder\.post": "post"}
FORMATS = {
    # github.com/CompVis/taming-transformers, taming/modules/diffusionmodules/model.py
    "taming": Format(
        keys={
            r"\.(down|up)\.(\d+)\.resample\.": r".\1.\2.\1sample.",
            r"\.mid\.0\.": ".mid.block_1.",
            r"\.mid\.1\.": ".mid.attn_1.",
            r"\.mid\.2\.": ".mid.block_2.",
        },
        # Its EMAVQ cannot be built (in its quantizer two names are undefined): `ema` is written as
        # VQModel. The last is that of github.com/TencentARC/SEED-Voken.
        quantizers={"gumbel": GUMBEL, "ema": VQ | EMA, "vq": VQ, "ibq": VQ},
        required={"mid_attention": True},
        decoder_from_top=True,
        ignored=("loss.", "model_ema.", "quantize.used", "colorize"),
    ),
    # github.com/FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py
    "llamagen": Format(
        keys={
            r"\.(down|up)\.(\d+)\.resample\.": r".\1.\2.\1sample.",
            r"\.(down|up)\.(\d+)\.block\.": r".\1.\2.res.",
            r"\.(down|up)\.(\d+)\.": r".conv_blocks.\2.",
        },
        quantizers={"cosine": VQ},
        commitment_cost=0.25,
        required={"mid_attention": True, "channels": 128, "num_res_blocks": 2, "in_channels": 3},
        ignored=("quantize.codebook_used",),
        buffers={"quantize.codebook_used": 65536},
        nest="model",
    ),
    # github.com/huggingface/diffusers, models/autoencoders/vq_model.py
    "diffusers": Format(
        keys={
            r"\.(down|up)\.(\d+)\.resample\.": r".\1_blocks.\2.\1samplers.0.",
            r"\.(down|up)\.(\d+)\.block\.": r".\1_blocks.\2.resnets.",
            r"\.(down|up)\.(\d+)\.attn\.": r".\1_blocks.\2.attentions.",
            r"\.mid\.0\.": ".mid_block.resnets.0.",
            r"\.mid\.1\.": ".mid_block.attentions.0.",
            r"\.mid\.2\.": ".mid_block.resnets.1.",
            r"\.norm_out\.": ".conv_norm_out.",
            r"\.nin_shortcut\.": ".conv_shortcut.",
            r"\.norm\.": ".group_norm.",
            r"\.([qkv])\.": r".to_\1.",
            r"\.proj_out\.": ".to_out.0.",
        },
        quantizers={"vq": VQ, "ema": VQ | EMA},
    ),
}
FIRST_KEY = "encoder.conv_in.weight"  # the same in all projects
MAX_LEVELS = 32
# Networks that `VQVAE` does not cover, by a part of a key that only they have.
OTHERS = {
    "VAR (residual grids of several sizes)": r"quantize\.quant_resi\.",
    "MaskGIT-VQGAN (padded and pooled differently)": r"decoder\.up\.\d+\.upsample_conv\.",
    "TiTok (a sequence of latent tokens, no grid)": r"(^|\.)latent_tokens$",
    "Open-MAGVIT2 (adaptive GroupNorm)": r"decoder\.adaptive\.\d+\.gamma",
    "BSQ-ViT (a vision transformer)": r"quantize\.group_basis$",
    "a GPT of LlamaGen: use python -m transformer.convert": r"tok_embeddings\.weight$",
}


def import_weights(
    project: str,
    state: Mapping[str, Tensor],
    image_size: tuple[int, int],
    settings: Mapping[str, Any] = {},
) -> tuple[VQVAE, list[str]]:
    """A `VQVAE` with the weights of another project's, and the keys that were ignored.

    The settings are those that do not show in the weights: dropout, entropy_weight, the quantizer.
    A ValueError for another network or quantizer, or missing or unknown keys.
    """
    layout = FORMATS[project]
    for other, pattern in OTHERS.items():
        if any(re.search(pattern, key) for key in state):
            raise ValueError(f"this is {other}, which is no network of {project}")
    # Lightning's LitEma keeps moving averages beside the weights, without the dots of their keys.
    state = {key: state.get(f"model_ema.{key.replace('.', '')}", x) for key, x in state.items()}
    try:
        inferred = infer_settings(layout, state, settings.get("quantizer", ""))
    except KeyError as error:
        raise ValueError(f"this is not a tokenizer of {project}: it has no {error}") from error
    config = VQVAEConfig.create(**inferred | dict(settings), image_size=image_size)
    keys = layout.all_keys(config)
    ignored = [key for key in state if layout.ignored and key.startswith(layout.ignored)]
    missing = sorted(set(keys.values()) - set(state))
    unknown = sorted(set(state) - set(keys.values()) - set(ignored))
    if missing or unknown:
        raise ValueError(
            f"{len(missing)} missing keys ({', '.join(missing[:5])}), "
            f"{len(unknown)} unknown keys ({', '.join(unknown[:5])})"
        )
    model = VQVAE(config)
    own = model.state_dict()
    for ours, theirs in keys.items():
        weight, shape = state[theirs], own[ours].shape
        if [n for n in weight.shape if n != 1] != [n for n in shape if n != 1]:
            raise ValueError(f"{theirs} must be {tuple(shape)}, got {tuple(weight.shape)}")
        own[ours] = weight.reshape(shape)  # without or with the 1x1 of a convolution
    own["quantizer.initialised"] = torch.tensor(True)
    model.load_state_dict(own)
    return model.eval(), ignored


def infer_settings(layout: Format, state: Mapping[str, Tensor], quantizer: str) -> dict[str, Any]:
    """Settings of `VQVAEConfig` from keys and shapes; a KeyError if they have another layout."""

    def numbers(key: str) -> list[int]:
        """Those numbers that make it a key of the state dict."""
        return [i for i in range(MAX_LEVELS) if layout.key(key.format(i=i)) in state]

    down = "encoder.down"
    levels = numbers(down + ".{i}.block.0.conv1.weight")
    channels, in_channels = state[FIRST_KEY].shape[:2]
    widths = [len(state[layout.key(f"{down}.{i}.block.0.conv2.weight")]) for i in levels or [0]]
    if any(width % channels for width in widths):
        raise ValueError(f"levels of widths {widths} are not multiples of the first, {channels}")
    known = layout.quantizers
    found = [x for x in known if state.keys() >= set(known[x].values())] or [*known]
    quantizer = quantizer or found[0]
    if quantizer not in found:
        raise ValueError(f"quantizer is {found[0]} in its weights, but {quantizer} in its config")
    codes = state[known[quantizer]["quantizer.embedding.weight"]]
    beta = 0.25 if quantizer == "ema" else layout.commitment_cost
    return {
        "in_channels": in_channels,
        **FIXED,
        "channels": channels,
        "channel_multipliers": tuple(width // channels for width in widths),
        "num_res_blocks": len(numbers(down + ".0.block.{i}.conv1.weight")),
        "attention_levels": tuple(numbers(down + ".{i}.attn.0.norm.weight")),
        "mid_attention": layout.key("encoder.mid.1.norm.weight") in state,
        "z_channels": len(state["encoder.conv_out.weight"]),
        "quantizer": quantizer,
        "codebook_size": len(codes),
        "codebook_dim": codes.shape[1],
        **({} if quantizer == "gumbel" else {"commitment_cost": beta}),
        **(IBQ if quantizer == "ibq" else {}),
    }


def export_weights(project: str, model: VQVAE) -> dict[str, Tensor]:
    """The weights of a `VQVAE` under another project's keys; a ValueError if it has no such one."""
    layout, config = FORMATS[project], model.config
    written = [name for name in layout.quantizers if name != "ibq"]  # SEED-Voken's is only read
    allowed: dict[str, Any] = {"quantizer": written}
    allowed |= {name: (x,) for name, x in {**FIXED, **layout.required}.items()}
    if project == "llamagen":
        allowed["attention_levels"] = ((len(config.channel_multipliers) - 1,),)
    for name, values in allowed.items():
        if (found := getattr(config, name)) not in values:
            only = ", ".join(map(str, values))
            raise ValueError(f"{project} has no tokenizer with {name} {found}, only {only}")
    for what, wrong in {
        "without quant_conv (z_channels 0)": config.z_channels == 0,
        "with gumbel and z_channels other than codebook_dim": config.quantizer == "gumbel"
        and config.z_channels != config.codebook_dim,
        "with channels in other than 32 groups": config.channels % 32 != 0,
        "with a wider first level": project == "diffusers" and config.channel_multipliers[0] != 1,
    }.items():
        if wrong:
            raise ValueError(f"{project} has no tokenizer {what}")
    state, own = {}, model.state_dict()
    for ours, theirs in layout.all_keys(config).items():
        if ours in EMA:
            continue
        weight = own[ours]
        if project == "diffusers" and ".attentions." in theirs and weight.dim() == 4:
            weight = weight[:, :, 0, 0]  # its attention has Linear instead of 1x1 convolutions
        if theirs == "quantize.proj.weight":
            weight = weight[:, :, None, None]  # and taming has it the other way round
        state[theirs] = weight.contiguous()
    return state | {name: torch.zeros(length) for name, length in layout.buffers.items()}


def smooth_image(config: VQVAEConfig) -> Tensor:
    """A random image (1, C, H, W) in [-1, 1] without sharp edges, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, config.in_channels, 8, 8, generator=generator)
    return F.interpolate(noise, size=config.image_size, mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def reconstruction_error(model: VQVAE) -> float:
    """Squared error for a smooth random image relative to that of a grey image.

    It is well below 1 for a trained model, and above where its weights are read wrongly.
    """
    images = smooth_image(model.config)
    error = model.decode(model.encode(images)) - images
    return float(error.square().mean() / images.square().mean())


@torch.no_grad()
def describe_lookup(model: VQVAE) -> tuple[float, dict[str, float]]:
    """How well codes fit the encodings of a smooth random image, to notice a wrong reading.

    Returns the error of the codes relative to that of a zero vector, below 1 for a model that is
    read as it was trained, and the share of equal indices by each lookup.
    """
    quantizer: Any = model.quantizer
    z_e = model.encoder(smooth_image(model.config))
    vectors = quantizer.project(z_e.permute(0, 2, 3, 1).flatten(0, 2))
    codes, indices = quantizer.codebook, quantizer.nearest(z_e).flatten()
    error = (vectors - codes[indices]).square().sum() / vectors.square().sum()
    products, lengths = vectors @ codes.T, codes.norm(dim=1)
    scores = {
        "distance": products - lengths.square() / 2,
        "inner product": products,
        "angle": products / lengths.clamp_min(1e-12),
    }
    same = {name: float((x.argmax(dim=1) == indices).float().mean()) for name, x in scores.items()}
    return float(error), same
