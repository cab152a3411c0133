"""A GPT over grids of codebook indices: model, attention with a 2-D window, sampling."""

from transformer.attention import FlexAttention
from transformer.config import FineTuningConfig, GPTConfig, make_prefix
from transformer.distribution import SamplingParams
from transformer.gpt import GPT
from transformer.rope import PositionExtension

__all__ = [
    "GPT",
    "FineTuningConfig",
    "FlexAttention",
    "GPTConfig",
    "PositionExtension",
    "SamplingParams",
    "make_prefix",
]
