"""Divergences against torch.distributions, closed forms and their published limits."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from scaletrain.objectives._divergence import bucketed, divergence


def logs(*seed: int, shape: tuple[int, ...] = (5, 7)) -> Any:
    generator = torch.Generator().manual_seed(sum(seed))
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return kl_divergence(Categorical(logits=log_a), Categorical(logits=log_b))


def test_both_directions_are_those_of_torch_distributions() -> None:
    p, q = logs(1), logs(2)
    torch.testing.assert_close(divergence("forward_kl", p, q), kl(p, q), rtol=0, atol=1e-10)
    torch.testing.assert_close(divergence("reverse_kl", p, q), kl(q, p), rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jensen_shannon(beta: float) -> None:
    p, q = logs(1), logs(2)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
    torch.testing.assert_close(divergence("jsd", p, q, beta), expected, rtol=0, atol=1e-10)


def test_closed_forms_of_two_tokens() -> None:
    p, q = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    assert divergence("forward_kl", p, q).item() == pytest.approx(math.log(1.25), abs=1e-12)
    assert divergence("reverse_kl", p, q).item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4), abs=1e-12)
    apart = torch.tensor([[1 - 1e-15, 1e-15]], dtype=torch.float64).log()
    assert divergence("jsd", apart, apart.flip(1)).item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(("beta", "kind"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_jensen_shannon_over_beta_tends_to_a_kl(beta: float, kind: Any) -> None:
    """Agarwal et al., 2024, section 2: JSD(β) / β tends to the forward KL as β goes to 0."""
    p, q = logs(1), logs(2)
    found = divergence("jsd", p, q, beta) / min(beta, 1 - beta)
    torch.testing.assert_close(found, divergence(kind, p, q), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients(kind: Any) -> None:
    p, z = logs(1), torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids = p.topk(3).indices
    assert torch.autograd.gradcheck(lambda z: divergence(kind, p, z.log_softmax(-1), 0.3), z.requires_grad_())
    few = bucketed(p, ids)
    assert torch.autograd.gradcheck(lambda z: divergence(kind, few, bucketed(z.log_softmax(-1), ids), 0.3), z)


def test_a_bucket_holds_all_other_tokens_and_bounds_the_divergence() -> None:
    p, q = logs(1, shape=(20, 50)), logs(2, shape=(20, 50))
    before = torch.zeros(20, dtype=torch.float64)
    for k in (1, 5, 20, 49, 50):
        ids = p.topk(k).indices
        few, student = bucketed(p, ids), bucketed(q, ids)
        assert few.shape[1] == min(k + 1, 50)
        torch.testing.assert_close(few.logsumexp(1), before * 0, atol=1e-12, rtol=0)
        torch.testing.assert_close(student[:, :k], q.gather(1, ids))
        found = divergence("forward_kl", few, student)
        assert (found >= before - 1e-12).all()  # finer buckets tell more apart
        before = found
    torch.testing.assert_close(before, divergence("forward_kl", p, q), rtol=0, atol=1e-10)
