"""Image tokenizer: an encoder, a learned codebook and a decoder, in PyTorch alone."""

from vqvae.model import VQVAE, VQVAEConfig, VQVAEOutput
from vqvae.presets import PRESETS
from vqvae.quantizers import QUANTIZERS, Quantized, QuantizerConfig

__all__ = [
    "PRESETS",
    "QUANTIZERS",
    "VQVAE",
    "Quantized",
    "QuantizerConfig",
    "VQVAEConfig",
    "VQVAEOutput",
]
