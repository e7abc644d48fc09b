"""How far a student's distribution q is from a teacher's p, of logarithms over the last dimension; 0 where p = q."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


def divergence(kind: Kind, log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Return D(p, q) in nats, (..., V) to (...).

    forward_kl: Σ p log(p / q) (Hinton et al., 2015, section 2, up to the teacher's entropy). reverse_kl: Σ q log(q / p)
    (Gu et al., 2024, "MiniLLM", eq. 1). jsd: β KL(p ‖ m) + (1 - β) KL(q ‖ m), where m = β p + (1 - β) q (Agarwal et
    al., 2024, "On-policy distillation of language models", eq. 1).
    """
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def bucketed(log_q: Tensor, ids: Tensor) -> Tensor:
    """Return the logarithms of the probabilities of some tokens, and of all others together.

    log_q: (C, V). ids: (C, k), all different. Returns (C, k + 1), or (C, k) where these are all tokens. By the data
    processing inequality a divergence of such distributions is at most that of the whole ones.
    """
    some = log_q.gather(1, ids)
    if ids.shape[1] == log_q.shape[1]:
        return some
    rest = log_q.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)  # of 1 - Σ q little would be left
    return torch.cat([some, rest], 1)
