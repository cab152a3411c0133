"""Published tokenizers as settings of `VQVAEConfig`."""

from types import MappingProxyType

# What taming-transformers' VQGANs and LlamaGen's tokenizer share.
_VQGAN = {
    "patch_size": 1,
    "channels": 128,
    "num_res_blocks": 2,
    "mid_blocks": 2,
    "mid_attention": True,
    "z_channels": 256,
    "codebook_size": 16384,
}

_TAMING = {**_VQGAN, "quantizer": "vq", "codebook_dim": 256}

# Fields that a preset leaves out have their defaults. "-s2d" is for space to depth: 2x2 pixels are
# moved into channels, so that the level at full resolution is no longer needed.
PRESETS = MappingProxyType(
    {
        "vqvae-small": {},
        "vqgan-f8": {
            **_TAMING,
            "channel_multipliers": (1, 1, 2, 4),
            "attention_levels": (3,),
        },
        "vqgan-f8-s2d": {
            **_TAMING,
            "patch_size": 2,
            "channel_multipliers": (1, 2, 4),
            "attention_levels": (2,),
        },
        "vqgan-f16": {
            **_TAMING,
            "channel_multipliers": (1, 1, 2, 2, 4),
            "attention_levels": (4,),
        },
        "vqgan-f16-s2d": {
            **_TAMING,
            "patch_size": 2,
            "channel_multipliers": (1, 2, 2, 4),
            "attention_levels": (3,),
        },
        "llamagen-f16": {
            **_VQGAN,
            "channel_multipliers": (1, 1, 2, 2, 4),
            "attention_levels": (4,),
            "quantizer": "cosine",
            "codebook_dim": 8,
        },
    }
)
