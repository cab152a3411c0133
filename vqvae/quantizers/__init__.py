"""Quantizers: vectors to codebook indices and back, eight ways behind one contract."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vqvae.quantizers.base import Quantized, Quantizer, QuantizerOptions, check_types
from vqvae.quantizers.gumbel import GumbelQuantizer
from vqvae.quantizers.residual import ResidualQuantizer
from vqvae.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from vqvae.quantizers.vector import (
    CosineQuantizer,
    EMAQuantizer,
    IndexBackpropagationQuantizer,
    VectorQuantizer,
)

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "QuantizerOptions", "make_options"]

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


def make_options(name: str, values: Mapping[str, Any]) -> QuantizerOptions:
    """The options of the quantizer `name`; values that are not given have its defaults.

    Raises:
        ValueError: no such quantizer, a value that has no effect with it, of another type or out
            of its range, or values that contradict each other.
    """
    if name not in tuple(QUANTIZERS):
        raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {name!r:.80}")
    options = QUANTIZERS[name].Options
    if unused := sorted(values.keys() - {field.name for field in fields(options)}):
        raise ValueError(f"{unused[0]} has no effect with the quantizer {name}; leave it out")
    return options(**options.resolve_defaults(check_types(options, values)))
