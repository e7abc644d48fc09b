"""YAML as recipes use it: values only, by the rules of YAML 1.2, and nothing said twice.

PyYAML follows YAML 1.1, in which `off` is false, `1e-3` is text and `1:30` is ninety. Here `true` and `false` are the
only booleans, `1e-3` is a number, and dates are text. Tags (`!!python/...`) are refused: a recipe executes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from scaletrain.errors import UserError

Key = tuple[str, ...]
"""Where a value stands: the keys, and positions in lists, that lead to it."""


class _Rules:
    """What plain words mean, to the reader and the writer alike."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _Reader(_Rules, yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                first = seen[key.value]
                raise yaml.MarkedYAMLError(
                    problem=f"`{key.value}` is given twice, first on line {first}", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = line
        return super().construct_mapping(node, deep)


class _Writer(_Rules, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _add_rules() -> None:
    digits = "-+0123456789"
    rules = [
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+", list(digits)),
        ("float", r"[-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.", list(digits + ".")),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
        ("merge", r"<<", ["<"]),
    ]
    for tag, pattern, first in rules:
        for letter in first:
            entry = (f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"))
            _Rules.yaml_implicit_resolvers.setdefault(letter, []).append(entry)
    _Reader.add_constructor("tag:yaml.org,2002:int", _read_int)
    _Writer.add_representer(tuple, lambda writer, value: writer.represent_list(value))


def _read_int(reader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Read an integer; a leading zero does not make it octal."""
    text = node.value.replace("_", "")
    return int(text, 16 if "x" in text else 10)


_add_rules()


def parse(text: str, name: str) -> tuple[Any, dict[Key, int]]:
    """Return the value of a document, and the line of every key in it.

    name: of the document, for messages. Raises UserError that names the line of a tag, a repeated key or bad syntax.
    """
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        lines: dict[Key, int] = {}
        if node is not None:
            _find_lines(node, (), lines)
        return (reader.construct_document(node) if node is not None else None), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise UserError(f"{where}: {_told(error)}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: not YAML: {error}.") from None


def _told(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error.context)
    if "could not determine a constructor for the tag" in problem:
        tag = problem.split("'")[1].replace("tag:yaml.org,2002:", "!!")
        return f"the tag `{tag}` is refused: a recipe holds plain values and executes nothing"
    return problem


def _find_lines(node: yaml.Node, key: Key, lines: dict[Key, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode):
                inner = (*key, name.value)
                lines[inner] = name.start_mark.line + 1
                _find_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            inner = (*key, str(position))
            lines[inner] = value.start_mark.line + 1
            _find_lines(value, inner, lines)


def read(path: Path) -> tuple[Any, dict[Key, int]]:
    """Return the value of a file, and the line of every key. Raises UserError as `parse` does."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8.") from None


def dump(value: Any) -> str:
    """Write a value such that `parse` gives it back."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)
