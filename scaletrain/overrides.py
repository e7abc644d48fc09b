"""Changes to a recipe before it is decoded: `a.b.c=value` from the command line, and what a stage sets.

All of it is on plain mappings and lists, as YAML gives them.

An override reaches every stage. One of a shared key is made in the recipe and in every stage that sets the same key,
so no stage's own value hides it. A stage that has taken away what the key is in, or has another type of objective,
stays as it is; an override that would reach no stage at all is refused.
`stages.NAME.a.b=value` changes one stage only and, being more exact, wins over `a.b=value` wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Literal

from scaletrain.errors import UserError, did_you_mean
from scaletrain.strict_yaml import Key, parse

Tree = dict[str, Any]


def override(tree: Tree, words: Iterable[str]) -> set[Key]:
    """Apply `key=value` words to a recipe, in place. Returns the keys, as in the tree, that they wrote.

    The value is YAML; `null` takes a key away, so that its default holds; `data.train.path=` goes into a list of one,
    and `data.train.0.path=` into any. Raises UserError for a word that can have no effect.
    """
    _write_sources_out(tree)
    pairs = [_split(word) for word in words]
    written: set[Key] = set()
    # A new objective type replaces all options, so types go first; what is said of one stage goes last.
    for keys, value in sorted(pairs, key=lambda pair: (pair[0][0] == "stages", pair[0][-2:] != ("objective", "type"))):
        if keys[0] == "stages" and len(keys) > 1 and not tree.get("stages"):
            raise UserError(f"`{'.'.join(keys)}`: this recipe has no stages.")
        stages = _stages_that_set(tree, keys) if keys[0] != "stages" else []
        for place, stage in stages:
            written.add((*place, *_put(stage, keys, deepcopy(value), ".".join(keys), drop=True)))
        written.add(_put(tree, keys, value, ".".join(keys), drop=keys[0] != "stages"))
        _write_sources_out(tree)
    return written


def stage_trees(tree: Tree) -> list[Tree]:
    """Return the stages of a recipe that has not been decoded yet."""
    stages = tree.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _write_sources_out(tree: Tree) -> None:
    """Write `train: x.jsonl` as `train: [{path: x.jsonl}]`, so that an override can go on from there."""
    for part in (tree, *stage_trees(tree)):
        data = part.get("data")
        for role in ("train", "eval"):
            if isinstance(data, dict) and data.get(role) is not None:
                items = data[role] if isinstance(data[role], list) else [data[role]]
                data[role] = [{"path": item} if isinstance(item, str) else item for item in items]


def merge_stage(base: Mapping[str, Any], stage: Mapping[str, Any]) -> Tree:
    """Return what a recipe comes to in a stage: mappings are merged, everything else is replaced, null takes away.

    A null for a key that the recipe does not set stays one, so that decoding can judge the key.
    """
    base = {k: v for k, v in base.items() if k != "stages"}
    changes = {k: v for k, v in stage.items() if k != "name"}
    kind = _objective_type(changes)
    if kind is not None and kind != _objective_type(base):
        base.pop("objective", None)
    return _merged(base, changes)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    result = dict(base)
    for key, value in changes.items():
        if value is None and key in result:
            del result[key]
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _objective_type(tree: Mapping[str, Any]) -> Any:
    objective = tree.get("objective")
    return objective.get("type") if isinstance(objective, Mapping) else None


def options_of(words: Iterable[str]) -> Tree:
    """Return `key=value` words as a mapping of keys to YAML values."""
    return {".".join(keys): value for keys, value in map(_split, words)}


def _split(word: str) -> tuple[Key, Any]:
    key, equals, text = word.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"`{word}`: write an override as key=value, such as `{key or 'key'}=64`.")
    if not text.strip():
        raise UserError(f"`{word}` gives no value; write `{key}=null` to take the key away.")
    if text[:1] in tuple("*@%&`"):  # a glob, say: no YAML value begins with these
        return keys, text
    return keys, parse(text, f"the value of `{key}`")[0]


def _stages_that_set(tree: Tree, keys: Key) -> list[tuple[Key, Tree]]:
    """Return the stages in which an override must be made too, each with its place in the tree.

    Raises UserError when no stage would see it: each has taken away what it is in, or has another objective.
    """
    stages = stage_trees(tree)
    seen = [_sees(tree, stage, keys) for stage in stages]
    if stages and set(seen) == {"not"}:
        words = " or ".join(f"`stages.{stage.get('name')}.{'.'.join(keys)}=...`" for stage in stages)
        raise UserError(f"`{'.'.join(keys)}` would reach no stage; write {words}.")
    return [(("stages", str(n)), stage) for n, stage in enumerate(stages) if seen[n] == "own"]


def _sees(tree: Tree, stage: Tree, keys: Key) -> Literal["own", "base", "not"]:
    """Say what a stage has at a key: a value of its own (there, or something that the key is in), the base's, none."""
    node: Any = stage
    for key in keys:
        if node is None:
            return "not"
        if not isinstance(node, dict):
            return "own"
        if key not in node:
            other = keys[0] == "objective" and _objective_type(stage) not in (None, _objective_type(tree))
            return "not" if other else "base"
        node = node[key]
    return "own"


def _put(node: Any, keys: Key, value: Any, word: str, drop: bool) -> Key:
    """Put a value at a key, and return where that is. Mappings on the way are made; list items must be there.

    drop: null takes the key away where it is set; else null is put, which takes away the recipe's key from a stage.
    """
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        position, named = _position(node, key, word)
        if named and not rest:
            node[position] = value
            return (str(position),)
        return (str(position), *_put(node[position], rest if named else keys, value, word, drop))
    if not isinstance(node, dict):
        raise UserError(f"`{word}`: `{key}` would stand inside the value {node!r}, which has no keys.")
    if rest:
        if node.get(key) is None:
            node[key] = {}
        return (key, *_put(node[key], rest, value, word, drop))
    if value is None and drop and key in node:
        del node[key]
        return (key,)
    if word.endswith("objective.type") and node.get(key) != value:
        node.clear()
    node[key] = value
    return (key,)


def _name(item: Any) -> Any:
    return item.get("name") if isinstance(item, dict) else None


def _position(items: list[Any], key: str, word: str) -> tuple[int, bool]:
    """Return which item of a list a part of a key leads to, and whether it names the item or is already inside it."""
    names = {str(_name(item)): n for n, item in enumerate(items) if _name(item) is not None}
    if key in names:
        return names[key], True
    if key.isdigit() and int(key) < len(items):
        return int(key), True
    if len(items) == 1 and not names and not key.isdigit():
        return 0, False
    known = names or [str(n) for n in range(len(items))]
    raise UserError(f"`{word}`: there is no item `{key}` in this list.{did_you_mean(key, known)}")
