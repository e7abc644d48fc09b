"""What names a frozen network, so that what it says of data can be kept: another one has another name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaletrain.checkpoint.integrity import sha256
from scaletrain.checkpoint.reader import manifest
from scaletrain.config import NetworkSpec
from scaletrain.data.cache import content_key
from scaletrain.shelf import Shelf


def identity(spec: NetworkSpec, source: Path | None) -> tuple[dict[str, Any], str]:
    """Return how a network is built, and a fingerprint of its weights: of all files, or the Hub's revision.

    source: the folder of the network that it continues from.
    """
    return spec.model_dump(exclude={"path", "source", "shard"}), content_key(list(_origins(spec, source)))


def _origins(spec: NetworkSpec, source: Path | None) -> Iterator[object]:
    """Yield what names each part of a network's weights: what it is made of, and the adapters that it is given.

    source: the folder of the network that it continues from.
    """
    if source is not None and spec.source:
        yield _hashes(source)
        checkpoint = source.parent.parent
        before = NetworkSpec.model_validate(manifest(checkpoint)["networks"][source.name])
        if before.adapter or not source.is_dir():  # the folder holds an adapter alone, or nothing
            yield from _origins(before, Shelf(checkpoint.parent).folder(before.source) if before.source else None)
    elif spec.path:
        yield _hashes(Path(spec.path)) if Path(spec.path).is_dir() else _revision(spec.path)
    if spec.adapter:
        yield [_hashes(Path(place)) for place in (spec.adapter.path, *spec.adapter.merge) if place]


def _hashes(folder: Path) -> list[tuple[str, str]]:
    """Return the names and hashes of weights and settings in a folder; nothing where there is none."""
    return [(p.name, sha256(p)) for p in sorted(folder.glob("*")) if p.suffix in (".safetensors", ".bin", ".json")]


def _revision(name: str) -> str:
    """Return the revision of a network on the Hub: that in the cache, or else the newest."""
    from huggingface_hub import model_info, try_to_load_from_cache

    there = try_to_load_from_cache(name, "config.json")
    return Path(there).parent.name if isinstance(there, str) else str(model_info(name).sha)
