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

# Fields that a preset leaves away have their defaults.
PRESETS = MappingProxyType(
    {
        "vqvae-small": {},
        "vqgan-f8": {
            **_VQGAN,
            "channel_multipliers": (1, 1, 2, 4),
            "attention_levels": (3,),
            "quantizer": "vq",
            "codebook_dim": 256,
        },
        "vqgan-f16": {
            **_VQGAN,
            "channel_multipliers": (1, 1, 2, 2, 4),
            "attention_levels": (4,),
            "quantizer": "vq",
            "codebook_dim": 256,
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
