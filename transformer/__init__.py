"""A GPT over grids of codebook indices: model, attention with a 2-D window, sampling."""

from transformer.completion import complete
from transformer.distribution import Guidance, Shaping
from transformer.gpt import GPT, GPTConfig
from transformer.positions import Beyond
from transformer.prefix import make_prefix
from transformer.sampling import generate

__all__ = [
    "GPT",
    "Beyond",
    "GPTConfig",
    "Guidance",
    "Shaping",
    "complete",
    "generate",
    "make_prefix",
]
