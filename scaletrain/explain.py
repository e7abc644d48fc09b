"""From pydantic's list of errors to one message: which key, what was given, what is expected, and where to look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from scaletrain.config import Duration
from scaletrain.errors import UserError, did_you_mean

M = TypeVar("M", bound=BaseModel)
Key = tuple[str, ...]
Where = Callable[[Key], str]


def decode(model: type[M], values: Mapping[str, Any], key: str = "", where: Where = lambda key: "") -> M:
    """Decode a mapping. Raises one UserError with a line for everything that is wrong with it.

    key: the dotted key at which the mapping stands. where: from a key inside it to words that say where it was written.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(_told(error, model, values, key, where))) from None


def check_part(model: type[BaseModel], values: Mapping[str, Any], key: str) -> None:
    """Check values that are to be completed later: as `decode`, but nothing is missing."""
    try:
        model.model_validate(dict(values))
    except ValidationError as error:
        if told := list(_told(error, model, values, key, lambda key: "", missing=False)):
            raise UserError("\n".join(told)) from None


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of a model, keys as the user writes them."""
    return model.model_json_schema(by_alias=True, schema_generator=_Schema)


class _Schema(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def _told(
    error: ValidationError, model: type[BaseModel], values: Any, key: str, where: Where, missing: bool = True
) -> Iterator[str]:
    by_path: dict[Key, list[Any]] = {}
    for fault in error.errors(include_url=False):
        if missing or fault["type"] != "missing":
            by_path.setdefault(_path(fault, values), []).append(fault)
    for path, faults in by_path.items():
        place = where(path)
        yield _sentence(faults, path, model, values, key) + (f" ({place})" if place else "")


def _path(fault: Any, values: Any) -> Key:
    """Return the key of an error as the user would write it: without pydantic's names for branches of a union."""
    path: list[str] = []
    for part in fault["loc"]:
        inside_list = isinstance(values, (list, tuple)) and isinstance(part, int)
        if inside_list or (isinstance(values, Mapping) and part in values):
            values = values[part]
        elif fault["type"] != "missing" or part != fault["loc"][-1]:
            continue
        path.append(str(part))
    return tuple(path)


def dotted(path: Key, values: Any, prefix: str = "") -> str:
    """Write a key as an override would: the position in a list of one is left out."""
    parts = [prefix] if prefix else []
    for part in path:
        if isinstance(values, (list, tuple)):
            single = len(values) == 1
            values = values[int(part)]
            if single:
                continue
        elif isinstance(values, Mapping):
            values = values.get(part)
        parts.append(part)
    return ".".join(parts)


def _sentence(faults: list[Any], path: Key, model: type[BaseModel], values: Any, prefix: str) -> str:
    """Say what is wrong at one key; several faults are those of the branches of a union."""
    name, kinds = dotted(path, values, prefix), {fault["type"] for fault in faults}
    if "missing" in kinds:
        return f"`{name}` is missing: give it in the recipe, or as `{name}=...` on the command line."
    if "extra_forbidden" in kinds:
        return f"`{name}`: there is no such key.{did_you_mean(path[-1], fields(model, path[:-1]))}"
    first, *others = dict.fromkeys(_expected(fault) for fault in faults)
    expected = " or ".join([first, *(other.removeprefix("it should be ") for other in others)])
    stop = "" if expected.endswith((".", "?")) else "."
    if not name:
        return expected + stop
    shown = repr(faults[0]["input"])
    return f"`{name}` is {shown if len(shown) <= 60 else shown[:57] + '...'}: {expected}{stop}"


def _expected(fault: Any) -> str:
    if fault["type"] in ("model_type", "dict_type"):
        return "it should be a mapping of keys to values"
    if fault["type"] == "literal_error":
        known = fault["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        hint = did_you_mean(str(fault["input"]), known)
        return f"it should be one of {', '.join(known)}.{hint if 'mean' in hint else ''}"
    message: str = fault["msg"]
    return message.removeprefix("Value error, ").replace("Input should", "it should")


def fields(model: type[BaseModel], path: Key) -> list[str]:
    """Return the keys that the mapping at a path of a model may have."""
    schema = schema_of(model)
    node = _resolved(schema, schema)
    for part in path:
        inner = node.get("properties", {}).get(part) or node.get("additionalProperties") or node.get("items")
        if not isinstance(inner, dict):
            return []
        node = _resolved(inner, schema)
    return list(node.get("properties", {}))


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while node.keys() & {"$ref", "anyOf"}:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        else:
            node = next((n for n in node["anyOf"] if n.keys() & {"$ref", "properties", "items"}), {})
    return node
