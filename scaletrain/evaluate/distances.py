"""Distances between two sets of points, as between samples and held-out data."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024  # of a matrix of distances, so that large sets fit


def mean_distance(x: Tensor, y: Tensor) -> float:
    """Return the mean Euclidean distance over all pairs of rows of x (N, D) and y (M, D), in fp64."""
    x, y = x.double(), y.double()
    total = sum(torch.cdist(part, y).sum() for part in x.split(_ROWS))
    return float(total) / (len(x) * len(y))


def energy_distance(x: Tensor, y: Tensor, unbiased: bool = True) -> float:
    """Return 2 E|X − Y| − E|X − X'| − E|Y − Y'| for x (N, ...) and y (M, ...) (Székely & Rizzo, 2013, equation 2.5).

    It is in the unit of x; each sample is taken as one flat vector.

    unbiased: leave the pairs of a sample with itself out of E|X − X'| (a U-statistic): the mean is then the distance
    of the distributions whatever N and M, and two sets of one distribution come out around 0, on either side. Else
    keep them (a V-statistic): the distance of the two sets themselves, never negative, 0 for equal sets only.

    Raises ValueError for sets of different widths, or of fewer than two samples.
    """
    x, y = x.flatten(1), y.flatten(1)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets of at least two samples each and of one width, not {x.shape} and {y.shape}")
    within = []
    for points in (x, y):
        scale = len(points) / (len(points) - 1) if unbiased else 1.0
        within.append(scale * mean_distance(points, points))
    return 2 * mean_distance(x, y) - sum(within)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return |μ − ν|² + tr(S + T − 2 (S T)^½) of the means and covariances of x (N, D) and y (M, D), in fp64.

    That is the squared distance of the two Gaussians (Dowson & Landau, 1982; Heusel et al., 2017, equation 6). It is
    biased: two sets of one distribution are further apart the fewer samples they have. Raises ValueError for sets of
    different widths, or of fewer than two samples.
    """
    if x.dim() != 2 or x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets (N, D) of at least two samples each, not {x.shape} and {y.shape}")
    (mu, s), (nu, t) = ((z.mean(0), torch.atleast_2d(torch.cov(z.T))) for z in (x.double(), y.double()))
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()  # (S T)^½ has the eigenvalues of this
    return float((mu - nu).square().sum() + s.trace() + t.trace() - 2 * both)


def energy_scores(x: Tensor, made: Tensor) -> Tensor:
    """Return the sum, over held-out samples x (N, D), of E|x − g| − E|g − g'| / 2 over made ones g (M, D), M ≥ 2.

    It is least, on average, for the distribution of the data, and for no other (Gneiting and Raftery, 2007, equation
    22).
    """
    return torch.cdist(x, made).mean(1).sum() - len(x) / 2 * torch.pdist(made).mean()
