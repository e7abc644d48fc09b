"""From a recipe's name or file, and overrides, to a checked tree of values and its stages.

Nothing here imports torch but `check` and `objective_of`, which import the modules that a recipe names.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletrain.catalog import find
from scaletrain.config import Recipe, Stage
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import check_part, decode, dotted, schema_of
from scaletrain.overrides import Tree, merge_stage, override, stage_trees
from scaletrain.strict_yaml import Key, dump, read

if TYPE_CHECKING:
    from types import ModuleType

    from scaletrain.objectives.base import Objective

GIVE = "???"
"""The value of a key that the user must give."""


def load(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply overrides (see `scaletrain.overrides`), and decode it and each of its stages.

    Raises one UserError for everything that is wrong with the keys that all recipes share. Imports no torch.
    """
    path = find(name_or_path)
    tree, lines = read(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a recipe: it should be a mapping of keys to values.")
    written = override(tree, overrides)

    def where(key: Key) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in written:
                return "on the command line"
            if key[:length] in lines:
                return f"{path}, line {lines[key[:length]]}"
        return "on the command line" if any(word[: len(key)] == key for word in written) else str(path)

    for _, stage in _merged_stages(tree):
        _refuse_open(stage)
    recipe = decode(Recipe, tree, where=where)
    for number, (name, stage) in enumerate(_merged_stages(tree) if recipe.stages else ()):
        own = tree["stages"][number]

        def place(key: Key, number: int = number, own: Tree = own, name: str = name) -> str:
            return f"stage `{name}`: {where(('stages', str(number), *key) if _has(own, key) else key)}"

        if "stages" in own:
            raise UserError(f"stage `{name}` has stages of its own; write them one after the other.")
        decode(Recipe, stage, where=place)
    return recipe


def _merged_stages(tree: Tree) -> list[tuple[str, Tree]]:
    stages = [(str(stage.get("name")), merge_stage(tree, stage)) for stage in stage_trees(tree)]
    return stages or [("main", {k: v for k, v in tree.items() if k != "stages"})]


def _has(tree: Any, key: Key) -> bool:
    for part in key:
        if not isinstance(tree, dict) or part not in tree:
            return isinstance(tree, list)
        tree = tree[part]
    return True


def _refuse_open(tree: Tree) -> None:
    """Raise UserError when a value that the user must give is still open."""
    open_keys = [dotted(key, tree) for key in _open(tree)]
    if open_keys:
        words = " ".join(f"{key}=..." for key in open_keys)
        one = len(open_keys) == 1
        raise UserError(
            f"{', '.join(f'`{key}`' for key in open_keys)} must be given: add {words} to the command, or write "
            f"{'it' if one else 'them'} in a copy of the recipe (`scaletrain cp`)."
        )


def _open(node: Any, key: Key = ()) -> list[Key]:
    if node == GIVE:
        return [key]
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    return [found for part, value in items for found in _open(value, (*key, str(part)))]


def stages(recipe: Recipe) -> list[Stage]:
    """Return the resolved stages: each recipe is the base with the stage's changes merged in; one, `main`, if none.

    Mappings are merged, lists and values replaced, null takes a key away; a changed `objective.type` replaces the whole
    objective.
    """
    tree = recipe.model_dump(by_alias=True, exclude_unset=True)
    return [Stage(name, Recipe.model_validate(stage)) for name, stage in _merged_stages(tree)]


def resolved_yaml(recipe: Recipe) -> str:
    """Write a recipe with its overrides and defaults, such that loading it gives the same recipe."""
    return dump(recipe.model_dump(by_alias=True))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe. Options of objectives and networks are open: their modules check them."""
    schema = schema_of(Recipe)
    kinds = sorted(objective_types())
    schema["$defs"]["ObjectiveSpec"]["properties"]["type"] |= {"anyOf": [{"enum": kinds}, {"type": "string"}]}
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/SourceSpec"}]}
    for role in ("train", "eval"):
        schema["$defs"]["DataSpec"]["properties"][role] = {
            "anyOf": [*source["anyOf"], {"type": "array", "items": source}]
        }
    network = schema["$defs"]["NetworkSpec"]["properties"]
    network["quantize"]["anyOf"].append(schema["$defs"]["QuantizeSpec"]["properties"]["type"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "scaletrain recipe"}


_OBJECTIVES = Path(__file__).parent / "objectives"
_code: set[str] = set()  # types that the user's own files add


def objective_types() -> set[str]:
    """Return the types of objective there are, without importing them: files with a class `Objective`, and `--code`."""
    files = _OBJECTIVES.glob("[!_]*.py")
    own = {p.stem for p in files if re.search(r"^class Objective\((?!ABC)", p.read_text("utf-8"), re.MULTILINE)}
    return own | _code


def load_code(path: Path) -> None:
    """Load a user's Python file as an objective type named by its stem. Raises UserError when it is not one."""
    name = path.stem
    if not path.is_file():
        raise UserError(f"--code: there is no file {path}.")
    if not name.isidentifier() or name in objective_types() - _code or (_OBJECTIVES / f"{name}.py").exists():
        raise UserError(f"--code: `{name}` cannot name an objective type, or is one already; rename {path}.")
    spec = importlib.util.spec_from_file_location(f"scaletrain.objectives.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--code: {path} cannot be imported: {type(error).__name__}: {error}.") from error
    if not hasattr(module, "Config") or not hasattr(module, "Objective"):
        raise UserError(
            f"--code: {path} must define a `Config` and an `Objective` (see scaletrain/objectives/base.py)."
        )
    _code.add(name)


def objective_module(kind: str) -> ModuleType:
    """Import the module of an objective type. Raises UserError that suggests a type."""
    known = objective_types()
    if kind not in known:
        raise UserError(
            f"`objective.type`: there is no objective `{kind}`.{did_you_mean(kind, known)} "
            "An objective of your own comes with --code FILE."
        )
    return importlib.import_module(f"scaletrain.objectives.{kind}")


def objective_of(recipe: Recipe) -> Objective[Any]:
    """Build the objective of a stage's recipe. Raises UserError for options that it does not take."""
    module = objective_module(recipe.objective.type)
    objective: Objective[Any] = module.Objective(decode(module.Config, recipe.objective.options, "objective"), recipe)
    return objective


def check(recipe: Recipe) -> None:
    """Check all that can be known before data or a device is touched, in every stage. Raises UserError.

    The objective's and the networks' options, the optimisers' and schedules' figures, that players are those of the
    objective's turns, and that `from: stage:NAME/...` names an earlier stage.
    """
    earlier: list[str] = []
    for stage in stages(recipe):
        try:
            _check_stage(stage.recipe, earlier)
        except UserError as error:
            raise UserError(f"stage `{stage.name}`: {error}" if recipe.stages else str(error)) from None
        earlier.append(stage.name)


def _check_stage(recipe: Recipe, earlier: list[str]) -> None:
    from scaletrain.networks.build import network_module
    from scaletrain.optim.optimizers import check_optimizer
    from scaletrain.optim.schedules import check_schedule

    objective = objective_of(recipe)
    players = {turn.player for turn in objective.turns}
    for key in ("seq_len", "packing"):
        if getattr(recipe.data, key) and key not in objective.data_keys:
            raise UserError(f"`data.{key}`: {recipe.objective.type} does not use it; remove it.")
    for name, player in recipe.players.items():
        if name not in players:
            raise UserError(
                f"`players.{name}`: {recipe.objective.type} has no player of that name.{did_you_mean(name, players)}"
            )
        check_optimizer(player.optimizer, f"players.{name}.optimizer")
        check_schedule(player.schedule, f"players.{name}.schedule")
    for name, network in recipe.networks.items():
        if network.type is not None:
            module = network_module(network.type, f"networks.{name}")
            check_part(module.Config, network.config, f"networks.{name}.config")
        source = network.source or ""
        origin = source.removeprefix("stage:").partition("/")[0]
        if source.startswith("stage:") and origin not in earlier:
            raise UserError(
                f"`networks.{name}.from`: there is no earlier stage `{origin}`.{did_you_mean(origin, earlier)}"
            )
