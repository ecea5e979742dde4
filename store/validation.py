"""What pydantic has refused, in plain words: one voice for specs, prediction options and requests."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

_PATTERNS: dict[str, str] = {}
_TYPES = {
    "int": "a whole number", "float": "a number", "string": "a string", "bool": "true or false", "list": "an array",
    "tuple": "an array", "dict": "an object", "model": "an object", "bytes": "a string",
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"), "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt"),
}  # fmt: skip


def in_words(pattern: str, words: str) -> str:
    """The pattern, whose mismatches are reported as "must be `words`" from now on."""
    _PATTERNS[pattern] = words
    return pattern


TEXT = in_words(r"^[^\x00]*$", "text without NUL characters")  # which PostgreSQL cannot look up


def reason(error: Mapping[str, Any], root: Any = None) -> str:
    """Why a value was refused.

    Args:
        error: one of `ValidationError.errors()`, with its input and context.
        root: the model that was validated; with it an unknown field is told the nearest known one.
    """
    kind, context, given = str(error["type"]), error.get("ctx") or {}, _shown(error.get("input"))
    if kind == "extra_forbidden":
        *within, name = error["loc"]
        known = sorted(_fields(root, within))
        inner = [f"{field}.{name}" for field in known if name in _fields(root, (*within, field)).difference(known)]
        near = inner or difflib.get_close_matches(str(name), known, 1, 0.5)
        return "unknown field" + (f"; did you mean {near[0]!r}?" if near else _known(known))
    if kind == "missing":
        return "is required"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        limit = context[bound]
        return f"must be {words} {int(limit) if limit == int(limit) else limit}, not {given}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}, not {given}"
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        return f"must be {_PATTERNS.get(pattern, f'a string that matches {pattern}')}, not {given}"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        unit = "character" if kind.startswith("string") else "item"
        words, count = ("at least", "min_length") if kind.endswith("short") else ("at most", "max_length")
        length = context[count]
        return f"must have {words} {length} {unit}{'s' * (length != 1)}"
    if kind == "finite_number":
        return f"must be a finite number, not {given}"
    if kind == "json_invalid":
        return f"is not valid JSON: {context.get('error', error['msg'])}"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    stem = kind.partition("_")[0]
    if stem in _TYPES:  # int_type, int_parsing, int_from_float, model_type, ...
        return f"must be {_TYPES[stem]}, not {given}"
    return f"{str(error['msg']).replace('Input should', 'should')}, not {given}"


def _known(names: Sequence[str]) -> str:
    return f"; known fields: {', '.join(names)}" if 0 < len(names) <= 12 else ""


def _shown(value: Any) -> str:
    """A value as the client wrote it in JSON, cut to a length that can be read."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(root: Any, location: Iterable[int | str]) -> set[str]:
    """Names of the fields that may stand at a location within a model."""
    models = _models(root)
    for part in location:
        if isinstance(part, int):
            continue
        inner = [field.annotation for model in models if (field := model.model_fields.get(part))]
        if inner:
            models = [found for annotation in inner for found in _models(annotation)]
        else:  # the tag of a union: the model one of whose fields can only have this value
            tagged = [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
            models = tagged or models
    return {name for model in models for name in model.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
