"""How far two sets of images are apart, from their features (N, D) in some network.

Each function takes the weights of `bootstrap.resample` for each set and gives a `Figure`. All
sums are in float64, on the device of the features.
"""

import torch
from torch import Tensor

from utils.evaluation.bootstrap import POSITIVE, Figure, figure

FRECHET_REPLICATES = 50  # each costs two covariances and two eigenvalue problems
CHUNK = 2048  # rows of a kernel matrix at a time


def _moments(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D) drawn `weights` (N,) times."""
    count = weights.sum()
    mean = weights @ features / count
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (count - 1)


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of symmetric matrices only."""
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt()  # cov_1 = root root^T
    product = torch.linalg.eigvalsh(root.T @ cov_2 @ root)  # has the eigenvalues of C1 C2
    cross = product.clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return distance.clamp(min=0)  # rounding may leave equal sets a little below


def frechet_distance(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Figure:
    """Frechet distance of two sets as Gaussians (arXiv 1706.08500): with Inception, the FID.

    It falls with the number of images, also for sets of the same kind: compare equal counts.

    Args:
        first, second: features (N, D) and (M, D).
        weights: (R, N) and (R, M), of which the first 51 count.
    """
    first, second = first.double(), second.double()
    rows = zip(*(part[: 1 + FRECHET_REPLICATES].to(first) for part in weights), strict=True)
    found = [_frechet(_moments(first, a), _moments(second, b)) for a, b in rows]
    return figure(torch.stack(found), POSITIVE)


def kernel_distance(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Figure:
    """Squared maximum mean discrepancy (arXiv 1801.01401): with Inception, the KID.

    The unbiased estimate from all pairs of images, by the kernel (x y / D + 1)^3. No pair of an
    image with itself counts, nor of two draws of one image in a resample.

    Args:
        first, second: features (N, D) and (M, D).
        weights: (R, N) and (R, M).
    """
    first, second = first.double(), second.double()
    w_1, w_2 = (part.to(first) for part in weights)

    def within(x: Tensor, w: Tensor) -> Tensor:
        own = (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
        pairs = w.sum(dim=1).square() - w.square().sum(dim=1)
        return (_kernel_sum(x, x, w, w) - w.square() @ own) / pairs

    between = _kernel_sum(first, second, w_1, w_2) / (w_1.sum(dim=1) * w_2.sum(dim=1))
    return figure(within(first, w_1) + within(second, w_2) - 2 * between)


def _kernel_sum(x: Tensor, y: Tensor, w_x: Tensor, w_y: Tensor) -> Tensor:
    """sum_ij w_x[i] k(x_i, y_j) w_y[j] for each row of the weights, (R,)."""
    total = torch.zeros(len(w_x), dtype=x.dtype, device=x.device)
    for part, w in zip(x.split(CHUNK), w_x.split(CHUNK, dim=1), strict=True):
        kernel = (part @ y.T / x.shape[1] + 1).pow_(3)  # (n, M)
        total += ((w @ kernel) * w_y).sum(dim=1)
    return total


def class_score(logits: Tensor, weights: Tensor) -> Figure:
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498): with Inception, the Inception Score.

    Args:
        logits: (N, classes), of all images at once and not of ten parts.
        weights: (R, N).
    """
    logs = logits.double().log_softmax(dim=1)
    shares = weights.to(logs) / len(logs)
    conditional = shares @ (logs.exp() * logs).sum(dim=1)
    marginal = shares @ logs.exp()
    scores = (conditional - torch.special.xlogy(marginal, marginal).sum(dim=1)).exp()
    return figure(scores, (1.0, float(logits.shape[1])))
