"""What can be done with a run folder afterwards: sample, evaluate, and judge the run as a whole."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scaletrain.assemble import prepare
from scaletrain.callbacks.pictures import write_samples
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import RECIPE
from scaletrain.config import Recipe, Stage
from scaletrain.data.order import key_of
from scaletrain.engine.world import World
from scaletrain.errors import UserError, agreed
from scaletrain.evaluation import evaluate as evaluate_set
from scaletrain.objectives.base import Objective, Report, Request, RunView, Samples
from scaletrain.recipe import load, objective_of, stages
from scaletrain.shelf import Shelf


@dataclass(frozen=True)
class FinishedStage:
    """A stage of a run folder as its newest checkpoint holds it."""

    folder: Path
    stage: Stage
    checkpoint: Path
    objective: Objective[Any]

    @classmethod
    def open(cls, folder: Path) -> FinishedStage:
        """Open the newest verified checkpoint. Raises UserError when the folder is no run or has none."""
        if not (folder / RECIPE).exists():
            raise UserError(f"{folder} is not a run folder: it has no {RECIPE}.")
        recipe = load(str(folder / RECIPE), [])
        found = reader.newest(folder)
        if found is None:
            raise UserError(f"{folder} has no checkpoint yet.")
        name = reader.manifest(found)["stage"]
        stage = next(s for s in stages(recipe) if s.name == name)
        return cls(folder, stage, found, objective_of(stage.recipe))

    def restore(self) -> None:
        """Give the objective back what it found out about the data, and where frozen networks of other runs are."""
        folders = {p.name: p for p in (self.checkpoint / "networks").iterdir()}
        for name, spec in self.stage.recipe.networks.items():
            if spec.frozen and spec.source:
                with suppress(UserError):  # they may be gone: for samples they need not be there
                    folders[name] = Shelf(self.folder).folder(spec.source)
        self.objective.restore(folders)

    def networks(self, device: torch.device) -> dict[str, torch.nn.Module]:
        """Load all networks, averaged where an average is kept, at rest on a device."""
        shelf, names = Shelf(self.folder), reader.manifest(self.checkpoint)["networks"]
        return {n: shelf.open(self.checkpoint, n).to(device).eval().requires_grad_(False) for n in names}


def sample(folder: Path, count: int, prompts: tuple[str, ...] = (), seed: int | None = None, **options: Any) -> Samples:
    """Draw samples from the newest checkpoint. Raises UserError for families that have nothing to draw."""
    run = FinishedStage.open(folder)
    run.restore()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key = run.stage.recipe.seed if seed is None else seed
    generator = torch.Generator(device).manual_seed(key_of(key, "samples"))
    with torch.no_grad():
        networks = run.networks(device)
        torch.manual_seed(key_of(key, "samples"))
        samples = run.objective.sample(networks, Request(count, generator, prompts, options))
    if samples is None:
        raise UserError(f"`{run.stage.recipe.objective.type}` has nothing to sample; try `scaletrain evaluate`.")
    return samples


def evaluate(folder: Path, data: list[str] | None = None) -> tuple[dict[str, float], Report | None]:
    """Evaluate the newest checkpoint on its evaluation data, or on other files; and judge the whole run if it ended."""
    run = FinishedStage.open(folder)
    recipe = run.stage.recipe
    if data:
        changed = recipe.data.model_dump() | {"eval": data}
        recipe = Recipe.model_validate(recipe.model_dump(by_alias=True) | {"data": changed})
    world = World.start()
    try:
        run.restore()
        examples = world.agree(lambda: prepare(run.objective, recipe), main_first=True)
        if examples.eval is None:
            raise agreed(UserError("there is no evaluation data: give --data FILE, or data.eval in the recipe."))
        networks = run.networks(world.device)
        metrics = evaluate_set(run.objective, networks, examples.eval, recipe, world)
        return metrics, None if data else world.on_main(lambda: report_on(folder, world.device))
    finally:
        world.close()


def report_on(folder: Path, device: torch.device) -> Report | None:
    """Have the last stage's objective judge a finished run; writes the report's files. None before it is finished."""
    recipe = load(str(folder / RECIPE), [])
    parts = stages(recipe)
    if reader.stage_end(folder, parts[-1].name) is None:
        return None
    objective = objective_of(parts[-1].recipe)
    if type(objective).report is Objective.report:
        return None
    end = reader.stage_end(folder, parts[-1].name)
    assert end is not None
    objective.restore({p.name: p for p in (end / "networks").iterdir()})
    shelf = Shelf(folder)
    options = {part.name: part.recipe.objective.model_dump() for part in parts}
    view = RunView(
        folder=folder,
        stages=tuple(part.name for part in parts),
        data=prepare(objective, parts[-1].recipe),
        device=device,
        seed=recipe.seed,
        network=lambda stage, network: shelf.stage(stage, network).to(device).eval().requires_grad_(False),
        options=options.__getitem__,
    )
    with torch.no_grad():
        report = objective.report(view)
    if report:
        for name, content in report.files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for stem, picture in report.pictures.items():
            write_samples(folder / "samples" / stem, picture)
    return report
