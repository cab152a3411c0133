"""How the gradient gets past the choice of a code, which has none of its own."""

import torch.nn.functional as F
from torch import Tensor


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q, bit for bit, with the gradient of z_e (arXiv 1711.00937, section 3.2)."""
    return z_q.detach() + (z_e - z_e.detach())


def rotation(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q, bit for bit, with the gradient of the rotation and scaling that brings z_e there.

    The rotation trick (arXiv 2410.06424, section 4.2): z_q = s R z_e, where R turns z_e's direction
    into z_q's in the plane of both, and s is the ratio of their lengths; s and R count as
    constants. All vectors are (N, D).
    """
    z_q = z_q.detach()
    before, after = F.normalize(z_e.detach(), dim=1), F.normalize(z_q, dim=1)
    middle = F.normalize(before + after, dim=1)
    scale = z_q.norm(dim=1, keepdim=True) / z_e.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    # R = I - 2 m m' + 2 a b', never written out as a matrix.
    turned = z_e - 2 * middle * _dot(middle, z_e) + 2 * after * _dot(before, z_e)
    return straight_through(scale * turned, z_q)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row, as (N, 1)."""
    return (left * right).sum(dim=1, keepdim=True)


GRADIENTS = {"straight_through": straight_through, "rotation": rotation}
