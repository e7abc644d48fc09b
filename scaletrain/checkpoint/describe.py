"""What is in a checkpoint, in words and figures, read from its JSON files and the heads of its tensors' files."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import checkpoints, number
from scaletrain.errors import UserError


def describe(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint, given its folder or that of a run, of which it is the newest. Nothing is verified.

    Raises UserError when there is none, or its manifest or state cannot be read.
    """
    from safetensors import SafetensorError

    found = checkpoints(folder)
    checkpoint = found[-1] if found else folder
    try:
        facts, state = reader.manifest(checkpoint), reader.state(checkpoint)
        files: dict[str, dict[str, Any]] = facts["files"]
        result = {
            "checkpoint": str(checkpoint),
            "all_steps": [number(path) for path in found],
            **{key: facts[key] for key in ("step", "stage", "stage_step", "complete", "best", "kept")},
            **{key: facts[key] for key in ("engine", "world_size", "versions")},
            "bytes": sum(file["bytes"] for file in files.values()),
            "files": {name: file["bytes"] for name, file in files.items()},
            "networks": {n: _network(checkpoint / "networks" / n, spec) for n, spec in facts["networks"].items()},
            "players": {n: _player(checkpoint / "training" / n, player) for n, player in state["players"].items()},
            "progress": state["progress"],
            "objective": sorted(state["objective"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{checkpoint} cannot be described ({cause}). `scaletrain verify` tells what is wrong."
        ) from error
    return result


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a folder, by name."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _network(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Describe a network: how it was built, and how many numbers it holds here (an adapter's, where it has one)."""
    shapes = _shapes(folder)
    adapter = spec["adapter"]["type"] if spec["adapter"] else None
    found = {key: spec[key] for key in ("type", "path", "from", "frozen")} | {"adapter": adapter}
    return found | {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes.values()))}


def _player(folder: Path, counters: dict[str, Any]) -> dict[str, Any]:
    """Describe a player: its counters, and what is kept for each of its parameters."""
    kinds: dict[str, int] = {}
    for name, shape in _shapes(folder).items():
        kind = "/".join(name.split("/")[: 2 if name.startswith("optimizer/") else 1])
        kinds[kind] = kinds.get(kind, 0) + math.prod(shape)
    return {**counters, "numbers": kinds}


def as_text(found: dict[str, Any]) -> str:
    """Write a description in lines."""
    end = ", the end of its stage" if found["complete"] else ""
    marks = "".join(f", {word}" for word in ("best", "kept") if found[word])
    lines = [
        f"{found['checkpoint']}: {found['bytes']:,} bytes in {len(found['files'])} files",
        f"step {found['step']:,}, stage {found['stage']} at step {found['stage_step']:,}{end}{marks}",
        f"written by {found['engine']} on {found['world_size']} process(es), torch {found['versions'].get('torch')}",
    ]
    for name, network in found["networks"].items():
        kind = " + ".join(str(network[key]) for key in ("type", "adapter") if network[key])
        held = "frozen, not stored" if network["frozen"] else f"{network['parameters']:,} numbers"
        lines.append(f"network {name}: {kind}, {held}")
    for name, player in found["players"].items():
        scale = f", loss scale {player['scaler']['scale']:g}" if player["scaler"] else ""
        lines.append(
            f"player {name}: {player['updates']:,} updates, {player['skipped']:,} skipped, lr {player['lr']:.3g}{scale}"
        )
        lines += [f"  {kind}: {count:,} numbers" for kind, count in player["numbers"].items()]
    known = {key: value for key, value in found["progress"].items() if value not in (None, {}, [])}
    lines += [textwrap.shorten(f"{key}: {value}", 120, placeholder=" ...") for key, value in known.items()]
    if found["objective"]:
        lines.append(f"objective: {', '.join(found['objective'])}")
    if len(found["all_steps"]) > 1:
        lines.append(f"checkpoints of the run: steps {', '.join(f'{step:,}' for step in found['all_steps'])}")
    return "\n".join(lines)
