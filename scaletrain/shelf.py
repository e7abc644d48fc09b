"""Finding the networks of finished stages and runs, each as it was left: for `from`, samples, exports and reports."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from scaletrain.checkpoint import reader
from scaletrain.config import NetworkSpec
from scaletrain.errors import UserError, did_you_mean
from scaletrain.networks.build import build, outline


class Shelf:
    """The networks in a run folder. `averaged` takes the EMA weights of networks whose player kept an average."""

    def __init__(self, root: Path):
        self.root = root

    def open(self, checkpoint: Path, network: str, averaged: bool = True) -> nn.Module:
        """Load one network of a checkpoint, on the CPU. Raises UserError when it has none of this name."""
        specs = {k: NetworkSpec.model_validate(v) for k, v in reader.manifest(checkpoint)["networks"].items()}
        if network not in specs:
            raise UserError(f"{checkpoint} has no network `{network}`.{did_you_mean(network, specs)}")
        spec, saved = specs[network], checkpoint / "networks" / network
        if spec.adapter is None and saved.is_dir():
            module = build(network, spec, None, saved)
        else:
            module = build(network, spec, self.base(spec), saved if saved.is_dir() else None)
        average = reader.average(checkpoint, network) if averaged else {}
        if average:
            with torch.no_grad():
                state = module.state_dict()
                for name, value in average.items():
                    state[name].copy_(value)
        return module

    def base(self, spec: NetworkSpec) -> nn.Module | None:
        """Load the network that `from` names, if it names one: `stage:NAME/NETWORK` or `run:FOLDER/NETWORK`."""
        return None if spec.source is None else self.other(spec.source)

    def other(self, source: str) -> nn.Module:
        """Load the network that a `from` names."""
        kind, _, rest = source.partition(":")
        place, _, network = rest.rpartition("/")
        if kind == "stage":
            return self.stage(place, network)
        return Shelf(Path(place)).open(self._newest(Path(place), source), network)

    def outline(self, name: str, spec: NetworkSpec) -> nn.Module:
        """Build a network without its weights, as those that it continues from have it (see `networks.build`)."""
        if spec.source is None:
            return outline(name, spec)
        return outline(name, spec, self.outline_of(spec.source))

    def outline_of(self, source: str) -> nn.Module:
        """Build the network that a `from` names without its weights."""
        kind, _, rest = source.partition(":")
        place, _, network = rest.rpartition("/")
        shelf = self if kind == "stage" else Shelf(Path(place))
        return shelf.outline(network, self.spec(source))

    def folder(self, source: str) -> Path:
        """Return the folder of the network that a `from` names, whether or not it holds weights of its own."""
        checkpoint, network = self._find(source)
        return checkpoint / "networks" / network

    def spec(self, source: str) -> NetworkSpec:
        """Return how the network that a `from` names was built. Raises UserError when there is none of this name."""
        checkpoint, network = self._find(source)
        specs = reader.manifest(checkpoint)["networks"]
        if network not in specs:
            raise UserError(f"from: {source}: there is no network `{network}`.{did_you_mean(network, specs)}")
        return NetworkSpec.model_validate(specs[network])

    def _find(self, source: str) -> tuple[Path, str]:
        kind, _, rest = source.partition(":")
        place, _, network = rest.rpartition("/")
        return self._end(place) if kind == "stage" else self._newest(Path(place), source), network

    def stage(self, stage: str, network: str) -> nn.Module:
        """Load a network as a stage of this run left it."""
        return self.open(self._end(stage), network)

    def _end(self, stage: str) -> Path:
        end = reader.stage_end(self.root, stage)
        if end is None:
            raise UserError(f"stage `{stage}` of {self.root} has not ended.")
        return end

    @staticmethod
    def _newest(folder: Path, source: str) -> Path:
        found = reader.newest(folder) if folder.is_dir() else None
        if found is None:
            raise UserError(f"from: {source}: there is no run with a checkpoint in {folder}.")
        return found
