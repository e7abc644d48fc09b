"""The blocks of a network: what is gathered, recomputed or compiled at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn

_EXPERTS = "experts"
"""The list of a mixture's experts, as transformers names it: processes may call different entries of it."""
_LARGE = 0.25
"""Share of a network's weights above which a block gives way to the entries of its own lists, if those hold most."""


def blocks(network: nn.Module, classes: Collection[str] = ()) -> dict[str, nn.Module]:
    """Return modules with weights by name, in the network's order, none inside another: the entries of its lists.

    That is how transformers, diffusers and our networks keep what is called one after the other. Of nested lists (a
    level of a U-Net and its residual blocks) the outer entries are taken, but for those that hold more than a quarter
    of the network. What shares weights with the rest of the network is left out. classes: take the modules of these
    classes instead.
    """
    found = _of(network, "", classes) if classes else _entries(network, "", _LARGE * _size(network))
    return {name: module for name, module in found if alone(module, network)}


def alone(module: nn.Module, network: nn.Module) -> bool:
    """Say whether a module of a network shares no weight with the rest of it."""
    everywhere = _names(network)
    return all(everywhere[weight] == count for weight, count in _names(module).items())


def _names(module: nn.Module) -> Counter[int]:
    """Return how many names each weight has, by its `id`."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _of(module: nn.Module, name: str, classes: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules of some classes."""
    for key, child in module.named_children():
        path = f"{name}.{key}".lstrip(".")
        if type(child).__name__ in classes:
            yield path, child
        else:
            yield from _of(child, path, classes)


def _entries(module: nn.Module, name: str, large: float) -> Iterator[tuple[str, nn.Module]]:
    """Yield the entries of the outermost lists, or of the lists inside an entry of more weights than `large`."""
    for key, child in module.named_children():
        path, size = f"{name}.{key}".lstrip("."), _size(child)
        if not isinstance(module, nn.ModuleList) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            if key != _EXPERTS:
                yield from _entries(child, path, large)
        elif size:
            inner = dict(_entries(child, path, large)) if size > large else {}
            yield from inner.items() if sum(map(_size, inner.values())) > size / 2 else [(path, child)]
