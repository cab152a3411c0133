"""Codebooks: vectors to indices and back, eight ways behind one contract."""

from vqvae.quantizers.config import QuantizerConfig
from vqvae.quantizers.contract import Quantized, Quantizer
from vqvae.quantizers.table import QUANTIZERS

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "QuantizerConfig", "make_quantizer"]


def make_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that a config describes."""
    return QUANTIZERS[config.quantizer](config)
