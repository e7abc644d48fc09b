"""Where a number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves


@contextmanager
def watched(networks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Note, in the order that they are computed, the modules whose answers are not finite, as `network.module`.

    Tangents of forward differentiation are answers, too. Each call of a module is read by the host: it is for finding
    what went wrong, not for training.
    """
    names = {id(m): f"{n}.{key}" if key else n for n, net in networks.items() for key, m in net.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        for value in tree_leaves(output):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            primal, tangent = unpack_dual(value)
            name = names.get(id(module))
            if name and not primal.isfinite().all():
                found.append(f"`{name}`")
            elif name and tangent is not None and not tangent.isfinite().all():
                found.append(f"the tangent of `{name}`")

    hook = register_module_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()
