"""A GPT over grids of codebook indices: model, attention with a 2-D window, sampling."""

from transformer.completion import complete, later_known_mask
from transformer.distribution import Guidance, SamplingParams
from transformer.flex import flex_attend_on
from transformer.gpt import GPT, GPTConfig
from transformer.order import random_order_probability, sample_permutations
from transformer.positions import PositionExtension
from transformer.prefix import drop_conditioning, make_prefix, null_prefix
from transformer.sampling import generate

__all__ = [
    "GPT",
    "GPTConfig",
    "Guidance",
    "PositionExtension",
    "SamplingParams",
    "complete",
    "drop_conditioning",
    "flex_attend_on",
    "generate",
    "later_known_mask",
    "make_prefix",
    "null_prefix",
    "random_order_probability",
    "sample_permutations",
]
