"""A GPT over grids of codebook indices: model, attention with a 2-D window, sampling."""

from transformer.gpt import GPT, GPTConfig
from transformer.sampling import generate

__all__ = ["GPT", "GPTConfig", "generate"]
