"""Image tokenizer: an encoder, a learned codebook and a decoder, in PyTorch alone."""

from vqvae.config import PRESETS, VQVAEConfig
from vqvae.model import VQVAE, VQVAEOutput
from vqvae.quantizers import QUANTIZERS, Quantized

__all__ = ["PRESETS", "QUANTIZERS", "VQVAE", "Quantized", "VQVAEConfig", "VQVAEOutput"]
