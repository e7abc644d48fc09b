"""How many tokens a transformer can read at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from scaletrain.config import AdapterSpec
from scaletrain.data.text import MULTIPLE


def positions(module: Any) -> int | None:
    """Return how many positions a network has for real tokens; None where their number has no bound.

    Embeddings of positions that have one for padding count from the place after it. Virtual tokens take theirs.
    """
    limit: int | None = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        return None
    paddings = [
        m.padding_idx
        for name, m in module.named_modules()
        if isinstance(m, nn.Embedding) and name.endswith("position_embeddings") and m.padding_idx is not None
    ]
    adapter = getattr(module, "peft_config", {}).get("default")
    return limit - (max(paddings) + 1 if paddings else 0) - getattr(adapter, "num_virtual_tokens", 0)


def virtual_tokens(spec: AdapterSpec | None) -> int:
    """Return how many tokens an adapter puts before the real ones."""
    if spec is not None and spec.path:
        file = Path(spec.path) / "adapter_config.json"  # where there is none, building it says so
        return int(json.loads(file.read_text()).get("num_virtual_tokens") or 0) if file.is_file() else 0
    return (spec.virtual_tokens or 16) if spec is not None and spec.type == "prompt" else 0


def fitting(room: int) -> int:
    """Return the longest that a text may be in so many positions, so that it fits when it is padded."""
    return room // MULTIPLE * MULTIPLE or room


def left(limit: int, virtual: int) -> int:
    """Return how long a text may be in a network of so many positions, where virtual tokens come before it."""
    return fitting(limit - virtual) if virtual else limit


def beside(virtual: int) -> str:
    """Say, after what `left` gives, where the other positions are."""
    return f", in multiples of {MULTIPLE}, beside {virtual} virtual tokens" if virtual else ""
