import torch
from torch import nn

from scaletrain.engine.hardware import flops_per_token, peak_flops


def test_flops_of_full_training_of_an_adapter_and_of_a_frozen_network() -> None:
    """Against counting: 2 FLOP for each weight in each matrix product that is taken."""
    assert flops_per_token([nn.Linear(10, 20, bias=False)]) == 6 * 200
    frozen = nn.Linear(10, 20, bias=False).requires_grad_(False)
    assert flops_per_token([frozen]) == 2 * 200
    adapted = nn.Sequential(frozen, nn.Linear(20, 2, bias=False))
    assert flops_per_token([adapted]) == 4 * 240 + 2 * 40


def test_the_peak_is_known_for_known_devices_only(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    cuda = torch.device("cuda", 0)
    for name, flops in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA Nothing", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, "bf16") == flops
    assert peak_flops(cuda, "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None
