"""Random numbers that follow from seed, image and token alone, whatever is drawn beside them."""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


STEP = _signed(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def keys(seed: int, images: Tensor) -> Tensor:
    """What the numbers of each image follow from, (B,), int64.

    Args:
        seed: any integer.
        images: (B,), int64, numbers of the images.
    """
    return _mix(images * STEP + _signed(seed))


def uniform(keys: Tensor, token: Tensor | int) -> Tensor:
    """A number in [0, 1) for one token of each image, (B,), float32.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a hash of the three: nothing is kept from
    one call to the next, so that no grid is too tall and no batch too small.

    Args:
        keys: (B,), of `keys`.
        token: number of the token in the image; (1,) or one for each.
    """
    steps = (torch.as_tensor(token, device=keys.device) + 1) * STEP  # modulo 2^64
    return (_mix(keys + steps) >> 40 & (1 << 24) - 1).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, which that of signed numbers does not."""
    return x >> bits & (1 << 64 - bits) - 1
