import threading

import pytest
import torch
from torch import nn

from scaletrain.checkpoint.background import Background, HostCopies


def test_copies_stay_as_they_were_and_their_memory_is_used_again() -> None:
    layer = nn.Linear(3, 2)
    copies = HostCopies()
    taken = copies.take({"a": dict(layer.named_parameters())})["a"]
    before = {k: v.detach().clone() for k, v in layer.named_parameters()}
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(taken["weight"], before["weight"])
    again = copies.take({"a": dict(layer.named_parameters())})["a"]
    assert again["weight"].data_ptr() == taken["weight"].data_ptr()
    assert torch.equal(again["weight"], layer.weight)
    assert not again["weight"].requires_grad


def test_what_is_reserved_is_what_is_copied_into() -> None:
    tensors = {"a": {"x": torch.ones(3), "y": torch.tensor(2)}}
    copies = HostCopies()
    copies.reserve(tensors)
    reserved = {buffer.data_ptr() for buffer in copies._buffers.values()}
    taken = copies.take(tensors)["a"]
    assert {tensor.data_ptr() for tensor in taken.values()} == reserved
    assert all(torch.equal(taken[name], tensor) for name, tensor in tensors["a"].items())


def test_tied_tensors_stay_tied_and_strides_do_not_matter() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    taken = HostCopies().take({"a": {"x": tensor, "y": tensor}, "b": {"x": tensor.clone()}})
    assert taken["a"]["x"] is taken["a"]["y"]
    assert taken["b"]["x"] is not taken["a"]["x"]
    assert taken["a"]["x"].is_contiguous()
    assert torch.equal(taken["a"]["x"], tensor)


@pytest.mark.gpu
def test_copies_of_a_gpu_are_pinned() -> None:
    tensor = torch.randn(1000, 1000, device="cuda")
    copies = HostCopies()
    taken = copies.take({"a": {"x": tensor}})["a"]["x"]
    expected = tensor.cpu()
    tensor.zero_()
    copies.wait()
    assert taken.is_pinned()
    assert torch.equal(taken, expected)


def test_one_piece_of_work_at_a_time() -> None:
    gate, order = threading.Event(), []
    background = Background()
    background.start(lambda: (gate.wait(5), order.append("first")))
    assert background.busy
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: order.append("second"))
    assert order[0] == "first"
    background.wait()
    assert order == ["first", "second"]
    assert not background.busy


def test_an_error_waits_until_it_is_asked_for_and_is_told_once() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    background = Background()
    background.start(fail)
    assert background._thread is not None
    background._thread.join()
    assert background.failed
    with pytest.raises(OSError, match="No space"):
        background.start(lambda: None)
    assert not background.failed
    background.wait()
