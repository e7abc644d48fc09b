"""The perceptron for points: its layers written out, for each activation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from scaletrain.networks import point_denoiser
from scaletrain.networks.point_denoiser import Config

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * np.vectorize(lambda v: 0.5 + 0.5 * float(torch.erf(torch.tensor(v / 2**0.5))))(x),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_are_those_of_a_perceptron_that_is_told_the_time(name: str) -> None:
    torch.manual_seed(0)
    network = point_denoiser.build(
        Config.model_validate({"hidden": [8, 6], "activation": name, "detail": 3.0})
    ).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    z, t = torch.randn(5, 2, dtype=torch.double), torch.rand(5, dtype=torch.double)
    w = {key: value.detach().numpy() for key, value in network.named_parameters()}
    act = ACTIVATIONS[name]
    times = network.waves(t).numpy() @ w["times.weight"].T + w["times.bias"]
    h = act(z.numpy() @ w["first.weight"].T + w["first.bias"] + times)
    h = act(h @ w["layers.0.weight"].T + w["layers.0.bias"])
    expected = h @ w["last.weight"].T + w["last.bias"]
    np.testing.assert_allclose(network(z, t).detach().numpy(), expected, rtol=1e-6)


def test_detail_scales_the_first_layer_and_at_first_nothing_is_predicted() -> None:
    torch.manual_seed(0)
    plain = point_denoiser.build(Config(hidden=[8]))
    torch.manual_seed(0)
    fine = point_denoiser.build(Config(hidden=[8], detail=5.0))
    torch.testing.assert_close(fine.first.weight, 5 * plain.first.weight)
    assert not fine(torch.randn(3, 2), torch.rand(3)).any()
