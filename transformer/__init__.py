"""A GPT over grids of codebook indices: model, attention with a 2-D window, sampling."""

from typing import Any

from transformer.attention import FlexAttention
from transformer.config import GPTConfig, drop_conditioning, make_prefix, null_prefix
from transformer.distribution import SamplingParams
from transformer.fine_tuning import FineTuningConfig
from transformer.gpt import GPT
from transformer.rope import PositionExtension, random_order_probability, sample_permutations

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


def __getattr__(name: str) -> Any:
    """The functions of `transformer.sampling`, which is read where something is sampled."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformer import sampling

    return getattr(sampling, name)
