"""The entropy regulariser: each vector sure of its code, all codes in use."""

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
    # A code that nobody comes near has a share of exactly 0, where the logarithm has no slope.
    log_mean = mean.clamp_min(1e-20).log()
    return -(shares * log_shares).sum(dim=1).mean(), -(mean * log_mean).sum()


def codebook_entropy_loss(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The entropy loss of vectors (N, D) softly assigned to codes (K, D) by squared distance.

    It needs N x K numbers, unlike the search for the nearest code.
    """
    half_norms = codebook.square().sum(dim=1) / 2
    # Codes of a deeper layer may all be 0, where the one before it leaves nothing over.
    scale = 2 / (TEMPERATURE * codebook.detach().square().sum(dim=1).mean()).clamp_min(1e-12)
    # The vectors' own squared length is the same for all codes and drops out of the softmax.
    one, all_of_them = entropy((vectors @ codebook.T - half_norms) * scale)
    return one - all_of_them
