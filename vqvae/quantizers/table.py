"""The table of all quantizers: what `--quantizer` offers and what every test runs through."""

from vqvae.quantizers.codebook import CosineQuantizer, VectorQuantizer
from vqvae.quantizers.ema import EMAQuantizer
from vqvae.quantizers.finite_scalar import FiniteScalarQuantizer
from vqvae.quantizers.gumbel import GumbelQuantizer
from vqvae.quantizers.index_backprop import IndexBackpropagationQuantizer
from vqvae.quantizers.lookup_free import LookupFreeQuantizer
from vqvae.quantizers.residual import ResidualQuantizer

QUANTIZERS = {
    "vq": VectorQuantizer,
    "ema": EMAQuantizer,
    "cosine": CosineQuantizer,
    "gumbel": GumbelQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "ibq": IndexBackpropagationQuantizer,
    "residual": ResidualQuantizer,
}
