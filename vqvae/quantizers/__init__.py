"""Quantizers: vectors to codebook indices and back, eight ways behind one contract."""

from vqvae.quantizers.base import Quantized, Quantizer, QuantizerOptions
from vqvae.quantizers.gumbel import GumbelQuantizer
from vqvae.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from vqvae.quantizers.vector import (
    CosineQuantizer,
    EMAQuantizer,
    IndexBackpropagationQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "QuantizerOptions"]
# A new quantizer is a class, with its options, and a line here; all tests run over this table.
QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "ema": EMAQuantizer,
    "cosine": CosineQuantizer,
    "gumbel": GumbelQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "ibq": IndexBackpropagationQuantizer,
    "residual": ResidualQuantizer,
}
