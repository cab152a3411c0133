"""A GPT over grids of codebook indices: model, attention with a 2-D window, sampling."""

from transformer.attention import FlexAttention
from transformer.config import (
    FineTuningConfig,
    GPTConfig,
    drop_conditioning,
    make_prefix,
    null_prefix,
)
from transformer.distribution import SamplingParams
from transformer.gpt import GPT
from transformer.rope import PositionExtension, random_order_probability, sample_permutations

__all__ = [
    "GPT",
    "FineTuningConfig",
    "FlexAttention",
    "GPTConfig",
    "PositionExtension",
    "SamplingParams",
    "drop_conditioning",
    "make_prefix",
    "null_prefix",
    "random_order_probability",
    "sample_permutations",
]
