"""A GPT over grids of codebook indices: model, attention with a 2-D window, sampling."""

from transformer.attention import FlexAttention
from transformer.config import GPTConfig, drop_conditioning, make_prefix, null_prefix
from transformer.fine_tuning import FineTuningConfig
from transformer.gpt import GPT
from transformer.rope import PositionExtension, random_order_probability, sample_permutations
from transformer.sampling import (
    SamplingParams,
    complete,
    generate,
    generate_likeliest,
    later_known_mask,
)

__all__ = [
    "GPT",
    "FineTuningConfig",
    "FlexAttention",
    "GPTConfig",
    "PositionExtension",
    "SamplingParams",
    "complete",
    "drop_conditioning",
    "generate",
    "generate_likeliest",
    "later_known_mask",
    "make_prefix",
    "null_prefix",
    "random_order_probability",
    "sample_permutations",
]
