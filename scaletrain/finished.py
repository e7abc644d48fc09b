"""What can be done with a run folder afterwards: sample, evaluate, and judge the run as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scaletrain.assemble import prepare, prepare_held
from scaletrain.callbacks.pictures import write_samples
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import RECIPE
from scaletrain.config import DataSpec, Recipe, SourceSpec, Stage
from scaletrain.data.dataset import Dataset
from scaletrain.data.order import key_of
from scaletrain.engine.world import World
from scaletrain.enrichment import do_ahead
from scaletrain.errors import UserError, agreed
from scaletrain.evaluation import evaluate as evaluate_set
from scaletrain.evaluation import sources_of
from scaletrain.explain import decode
from scaletrain.networks.build import build
from scaletrain.objectives.base import Objective, Report, Request, RunView, Samples
from scaletrain.recipe import load, objective_of, stages
from scaletrain.shelf import Shelf
from scaletrain.strict_yaml import parse


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

    def judging(self, rows: int) -> FinishedStage:
        """Return the same, whose objective answers so many rows. Raises UserError for families that answer nothing."""
        spec = self.stage.recipe.objective
        if type(self.objective).judge is Objective.judge:
            raise UserError(f"--generate: `{spec.type}` generates no answers; leave it out.")
        judge = {**(spec.options.get("judge") or {}), "rows": rows}
        return self.under(objective=spec.model_validate({**spec.model_dump(), "judge": judge}))

    def under(self, **changes: Any) -> FinishedStage:
        """Return the same under a recipe of which these keys differ. Its objective is not restored."""
        stage = Stage(self.stage.name, self.stage.recipe.model_copy(update=changes))
        return replace(self, stage=stage, objective=objective_of(stage.recipe))

    def restore(self) -> None:
        """Give the objective back what it found out about the data, and where frozen networks of other runs are."""
        _restore(self.objective, self.stage.recipe, self.checkpoint, Shelf(self.folder))

    def held(self, files: Sequence[str]) -> Dataset | None:
        """Prepare files, or else the recipe's evaluation data. Training data are read for a holdout only.

        files: paths with the columns of the recipe's sources, or whole sources as YAML mappings. Raises UserError.
        """
        recipe = self.stage.recipe
        if files:
            sources: list[SourceSpec] | None = _sources(files, recipe)
        else:
            sources = recipe.data.eval
        if sources is None:
            return prepare(self.objective, recipe).eval if recipe.data.holdout else None
        found = prepare_held(self.objective, sources)
        self._check_fit()
        return found

    def _check_fit(self) -> None:
        """Raise UserError where the data ask for networks that are not those of the checkpoint."""
        stored = reader.manifest(self.checkpoint)["networks"]
        for name, spec in self.objective.networks().items():
            own = stored[name]["config"]
            for key, value in spec.model_dump(mode="json")["config"].items():
                if stored[name]["from"] is None and own.get(key, value) != value:
                    raise UserError(
                        f"these data do not fit the run: they make networks.{name}.config.{key} {value!r}, and it was "
                        f"trained with {own[key]!r}."
                    )

    def networks(self, device: torch.device) -> dict[str, torch.nn.Module]:
        """Load all networks, averaged where an average is kept, at rest on a device."""
        shelf, names = Shelf(self.folder), reader.manifest(self.checkpoint)["networks"]
        return {n: shelf.open(self.checkpoint, n).to(device).eval().requires_grad_(False) for n in names}


def _restore(objective: Objective[Any], recipe: Recipe, checkpoint: Path, shelf: Shelf) -> None:
    """Give an objective what it wrote beside the networks of a checkpoint, where frozen ones of others are, and what
    it carried from step to step.
    """
    folders = {p.name: p for p in (checkpoint / "networks").iterdir()}
    for name, spec in recipe.networks.items():
        if spec.frozen and spec.source:
            with suppress(UserError):  # they may be gone: for samples they need not be there
                folders[name] = shelf.folder(spec.source)
    objective.restore(folders)
    objective.load_state_dict(reader.family(checkpoint))


def default_device() -> torch.device:
    """Return a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sample(folder: Path, count: int, prompts: tuple[str, ...] = (), seed: int | None = None, **options: Any) -> Samples:
    """Draw samples from the newest checkpoint. Raises UserError for families that have nothing to draw."""
    run = FinishedStage.open(folder)
    if prompts and not run.objective.takes_prompts:
        raise UserError(f"--prompt: `{run.stage.recipe.objective.type}` takes no prompts; leave it out.")
    run.restore()
    device = default_device()
    key = run.stage.recipe.seed if seed is None else seed
    generator = torch.Generator(device).manual_seed(key_of(key, "samples"))
    with torch.no_grad():
        networks = run.networks(device)
        torch.manual_seed(key_of(key, "draws"))  # of what samplers draw beside the noise that they begin with
        samples = run.objective.sample(networks, Request(count, generator, prompts, options))
    if samples is None:
        raise UserError(f"`{run.stage.recipe.objective.type}` has nothing to sample; try `scaletrain evaluate`.")
    return samples


def evaluate(
    folder: Path, data: Sequence[str] = (), generate: int | None = None
) -> tuple[dict[str, float], tuple[str, ...], Report | None]:
    """Evaluate the newest checkpoint on its evaluation data, or on other files; and judge the whole run if it ended.

    generate: have so many rows of each source answered, and compare the answers, whatever the recipe says. Returns the
    metrics, the sources that they are given by, too, and the report. Raises UserError for families that answer nothing.
    """
    run = FinishedStage.open(folder)
    run = run if generate is None else run.judging(generate)
    recipe = run.stage.recipe
    world = World.start()
    try:
        run.restore()
        held = world.agree(lambda: run.held(data), main_first=True)
        if held is not None and (ahead := run.objective.ahead()):
            do_ahead(ahead, ahead.networks, run.stage, Shelf(folder), world, lambda: False)
        metrics = {}
        if held is not None:
            metrics = evaluate_set(run.objective, run.networks(world.device), held, recipe, world)
        report = None if data else world.on_main(lambda: report_on(folder, world.device))
        if held is None and report is None:
            raise agreed(UserError("there is no evaluation data: give --data FILE, or data.eval in the recipe."))
        return metrics, () if held is None else sources_of(held), report
    finally:
        world.close()


def evaluate_tasks(folder: Path, tasks: Sequence[str]) -> dict[str, float]:
    """Evaluate the newest checkpoint on tasks of EleutherAI's harness. Raises UserError, also where it is missing."""
    from scaletrain.evaluate.harness import check_installed, run_tasks

    check_installed()
    run = FinishedStage.open(folder)
    if type(run.objective).language_model is Objective.language_model:
        raise UserError(f"--lm-eval: `{run.stage.recipe.objective.type}` has no network that continues texts.")
    run.restore()
    model, tokenizer = run.objective.language_model(run.networks(default_device()))
    return run_tasks(model, tokenizer, tasks, run.stage.recipe.evaluation_batch)


def _sources(files: Sequence[str], recipe: Recipe) -> list[SourceSpec]:
    """Read what `--data` says: paths take over the columns that all sources of the recipe have in common."""
    known = [source.columns for source in (recipe.data.eval or recipe.data.train)]
    columns = known[0] if all(own == known[0] for own in known) else {}
    given = [parse(file, "--data")[0] if file.startswith("{") else {"path": file, "columns": columns} for file in files]
    return decode(DataSpec, {"train": given, "eval": given}, "--data").eval or []


def source_of(text: str) -> SourceSpec:
    """Read a source as data.train takes it: a path, or a YAML mapping. Raises UserError."""
    given = parse(text, "DATA")[0] if text.startswith("{") else {"path": text}
    return decode(SourceSpec, given, "DATA")


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
    shelf = Shelf(folder)
    _restore(objective, parts[-1].recipe, end, shelf)
    recipes = {part.name: part.recipe for part in parts}

    def opened(stage: str) -> Objective[Any]:
        found, checkpoint = objective_of(recipes[stage]), reader.stage_end(folder, stage)
        assert checkpoint is not None
        _restore(found, recipes[stage], checkpoint, shelf)
        return found

    def network(stage: str, name: str) -> torch.nn.Module:
        ahead = opened(stage).ahead()
        if ahead and name in ahead.networks:  # the training did without it
            spec = ahead.networks[name]
            found = build(name, spec, shelf.base(spec))
        else:
            found = shelf.stage(stage, name)
        return at_rest(found)

    def at_rest(found: torch.nn.Module) -> torch.nn.Module:
        return found.to(device).eval().requires_grad_(False)

    view = RunView(
        folder=folder,
        stages=tuple(part.name for part in parts),
        data=prepare(objective, parts[-1].recipe),
        device=device,
        seed=recipe.seed,
        network=network,
        objective=opened,
        other=lambda source: at_rest(shelf.other(source)),
    )
    with torch.no_grad():
        report = objective.report(view)
    if report:
        for name, content in report.files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for stem, picture in report.pictures.items():
            write_samples(folder / "samples" / stem, picture)
    return report
