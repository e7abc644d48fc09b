"""How long saving holds the loop up: asynchronous against synchronous, of a network with AdamW's moments.

Both ways save the same stage at the same steps through `Snapshot`, with updates between. Blocked is what the loop waits
for inside `save`, plus what its updates take longer while a checkpoint is written beside them.

    python benchmarks/checkpoint.py [--parameters 200_000_000] [--saves 4] [--folder DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from scaletrain.checkpoint.layout import checkpoints
from scaletrain.config import CheckpointSpec, NetworkSpec
from scaletrain.crew import Crew, Progress
from scaletrain.engine.data_parallel import DataParallel
from scaletrain.engine.world import World
from scaletrain.networks.build import build
from scaletrain.optim.schedules import Schedule
from scaletrain.player import Player
from scaletrain.snapshot import Snapshot

WIDTH = 2048


class Family:
    """An objective that carries nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def save_assets(self, network: str, folder: Path) -> None:
        """Nothing."""


def crew(spec: NetworkSpec, world: World) -> Crew:
    """A network and AdamW over it, with moments."""
    from scaletrain.config import ScheduleSpec

    torch.manual_seed(0)
    model = build("model", spec).to(world.device)
    trainable = {f"model/{name}": p for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    player = Player("model", {"model": model}, trainable, optimizer, Schedule(ScheduleSpec(), 1000), base_lrs=[1e-4])
    engine = DataParallel(world, "fp32")
    engine.prepare([player], {"model": model})
    return Crew(Family(), None, engine, {"model": player})  # type: ignore[arg-type]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    """Take an update. Returns its seconds."""
    began = time.perf_counter()
    torch.manual_seed(number)
    model(torch.randn(64, WIDTH, device=next(model.parameters()).device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak() -> float:
    """Return the largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(root: Path, asynchronous: bool, options: argparse.Namespace, world: World) -> tuple[float, list[float]]:
    """Save so many times with updates between. Returns the seconds that were lost, and those inside each save."""
    layers = max(1, round(options.parameters / (WIDTH * WIDTH + WIDTH)) - 1)
    config = {"inputs": WIDTH, "outputs": WIDTH, "hidden": [WIDTH] * layers}
    spec = NetworkSpec(type="mlp", config=config)
    members = crew(spec, world)
    model, optimizer = members.engine.plain()["model"], members.players["model"].optimizer
    snapshot = Snapshot(root, ("main",), {"model": spec}, world, CheckpointSpec(asynchronous=asynchronous, keep=99))
    stage: Any = SimpleNamespace(name="main")
    number = 0
    for _ in range(3):  # AdamW makes its moments
        step(model, optimizer, number := number + 1)
        snapshot.reserve(members)  # as the trainer does after the first step
    lost, blocked, beside = 0.0, [], 0
    for _ in range(options.saves):
        began = time.perf_counter()
        snapshot.save(number, stage, members, Progress(step=number))
        blocked.append(time.perf_counter() - began)
        slow = []
        while snapshot._background.busy:
            slow.append(step(model, optimizer, number := number + 1))
        alone = statistics.median(step(model, optimizer, number := number + 1) for _ in range(options.between))
        lost += blocked[-1] + sum(slow) - alone * len(slow)
        beside += len(slow)
        for _ in range(options.steps - len(slow)):  # the same weights at the next save, however long this one took
            step(model, optimizer, number := number + 1)
    snapshot.finish()
    waits = ", ".join(f"{seconds:.2f}" for seconds in blocked)
    print(f"  in save {waits} s; {beside} updates beside; update {alone:.2f} s alone; peak memory {peak():.2f} GB")
    return lost / options.saves, blocked


def digest(root: Path) -> list[str]:
    """Return the hash of every file of every checkpoint."""
    files = sorted(p for folder in checkpoints(root) for p in folder.rglob("*") if p.is_file())
    return [f"{p.relative_to(root)} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=200_000_000)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--between", type=int, default=5, help="updates with nothing beside them, to compare with")
    parser.add_argument("--steps", type=int, default=12, help="updates between saves, at least as many as one takes")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    world = World.start()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results, roots = {}, {}
        for name in ("synchronous", "asynchronous"):
            print(name)
            roots[name] = Path(folder) / name
            results[name] = measure(roots[name], name == "asynchronous", options, world)
        same = digest(roots["synchronous"]) == digest(roots["asynchronous"])
    inside = {name: statistics.mean(blocked) for name, (_, blocked) in results.items()}
    lost = {name: seconds for name, (seconds, _) in results.items()}
    for words, found in (("inside save", inside), ("lost in all", lost)):
        a, b = found["asynchronous"], found["synchronous"]
        print(f"{words}: {a:.2f} s against {b:.2f} s a save, {a / b:.3f}")
    print(f"bytes are the same: {same}")


if __name__ == "__main__":
    main()
