"""The entropy regulariser: each vector sure of its code, all codes in use."""

import torch
from torch import Tensor

# Softness of the assignment, against the codes' mean squared length.
TEMPERATURE = 0.01


def entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of assignments given by logits (N, K): mean entropy of one, entropy of their mean, in nats.

    A codebook in good health has a low first and a high second: the loss is their difference
    (arXiv 2310.05737, equation 6).
    """
    log_shares = logits.log_softmax(dim=1)
    shares = log_shares.exp()
    mean = shares.mean(dim=0)
    return -(shares * log_shares).sum(dim=1).mean(), -torch.special.xlogy(mean, mean).sum()


def codebook_entropy_loss(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The entropy loss of vectors (N, D) softly assigned to codes (K, D) by squared distance.

    It needs N x K numbers, unlike the search for the nearest code.
    """
    half_norms = codebook.square().sum(dim=1) / 2
    scale = 2 / (TEMPERATURE * codebook.detach().square().sum(dim=1).mean())
    # The vectors' own squared length is the same for all codes and drops out of the softmax.
    one, all_of_them = entropy((vectors @ codebook.T - half_norms) * scale)
    return one - all_of_them
