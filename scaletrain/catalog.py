"""The recipes that come with the package: their names, and what the comments at their tops say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scaletrain.errors import UserError, did_you_mean

_HERE = Path(__file__).parent
RECIPES = next((d for d in (_HERE / "recipes", _HERE.parent / "recipes") if d.is_dir()), _HERE / "recipes")
"""In a wheel inside the package, in a checkout beside it."""


@dataclass(frozen=True)
class Info:
    """What the comment at the top of a recipe says: a summary, then `Key: value` lines, such as `Cost: 4 minutes`."""

    name: str
    family: str
    summary: str
    path: Path
    facts: Mapping[str, str]
    """`command`, `needs`, `cost`, `expect`: whichever the comment has; a value may have several lines."""

    @property
    def needs(self) -> str:
        """What must be there before it can run: data, a pretrained model, an extra."""
        return " ".join(self.facts.get("needs", "").split())


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))


def list_recipes() -> list[Info]:
    """Return what the recipes' header comments say, by name."""
    return [info(name) for name in names()]


def info(name: str) -> Info:
    """Read the header comment of a recipe."""
    path = RECIPES / f"{name}.yaml"
    summary: list[str] = []
    facts: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[1:]
        fact = re.match(r" ?([A-Za-z]+):\s+(.*)", text)
        if fact:
            key = fact.group(1).lower()
            facts[key] = fact.group(2).strip()
        elif key and text.strip():
            facts[key] += f"\n{text.strip()}"
        elif text.strip():
            summary.append(text.strip())
    return Info(name, facts.pop("family", name.partition("/")[0]), " ".join(summary), path, facts)


def find(name_or_path: str) -> Path:
    """Return the file of a recipe, given its name or a path to a YAML file. Raises UserError that suggests a name."""
    known = names()
    if name_or_path in known:
        return RECIPES / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"There is no file {path}.")
    raise UserError(f"There is no recipe `{name_or_path}`.{did_you_mean(name_or_path, known)} `scaletrain ls` tells.")


def run_name(name_or_path: str) -> str:
    """Return the run folder's name by default: the recipe's name with `/` as `-`, or the name of the file."""
    return name_or_path.replace("/", "-") if name_or_path in names() else Path(name_or_path).stem


def copy(name_or_path: str, destination: Path) -> None:
    """Copy a recipe. Raises UserError when the destination exists or cannot be written."""
    source = find(name_or_path)
    try:
        with destination.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{destination} exists already; choose another name.") from None
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror}.") from None


def find_run(run: str, root: Path) -> Path:
    """Return a run folder, given itself or its name in `root`. Raises UserError that suggests a name."""
    if found := is_run(run, root):
        return found
    known = [path.parent.name for path in root.glob("*/recipe.yaml")]
    raise UserError(f"There is no run {run} here or in {root}.{did_you_mean(run, known)}")


def is_run(run: str, root: Path) -> Path | None:
    """Return a run folder, given itself or its name in `root`; None where there is none."""
    return next((f for f in (Path(run), root / run) if (f / "recipe.yaml").is_file()), None)
