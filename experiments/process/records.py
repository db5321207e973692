"""Records as JSON: frozen dataclasses, written and read back by the types of their fields.

A field may say in its metadata how it is written: ``{"json": "class"}`` under another name,
``INLINE`` among the keys of its owner (a dataclass, or a mapping, which then takes every key that
is no other field's). A field that is None, and None by default, is left out. Numbers that are not
finite become ``null``. Keys that a reader does not know are passed over.

A file of records carries a schema number. A reader knows the schemas up to its own, and one without
a number is of schema 1.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipelines.faults import DataError
from experiments.process.storage import read_json, write_text

T = TypeVar("T")

INLINE = {"inline": True}
"""Metadata of a field whose keys stand among those of its owner."""

Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""From the content of a file in one schema to that in the next one."""


class RecordError(ValueError):
    """A value that is not of its type; the message says where it stands."""


def encode(value: object) -> Any:
    """JSON values of a record, or of whatever holds records."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode_fields(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, np.generic):
        return encode(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"no JSON for {type(value).__name__}")


def _encode_fields(record: Any) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value is None and field.default is None:
            continue
        if field.metadata.get("inline"):
            values |= encode(value) or {}
        else:
            values[field.metadata.get("json", field.name)] = encode(value)
    return values


def decode(kind: type[T], value: object, where: str = "the record") -> T:
    """The record of a type from its JSON values.

    Raises:
        RecordError: a key is missing, or a value is of another type.
    """
    return _decode(kind, value, where)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (hint,) = (kind for kind in arguments if kind is not types.NoneType)
        return _decode(hint, value, where)
    if hint is object:
        return value
    if origin is typing.Literal:
        if value in arguments:
            return value
        known = ", ".join(map(repr, arguments))
        raise RecordError(f"{where} is {value!r:.40} where one of {known} is expected")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value  # a whole number stays one: what is written again is as it was
    if isinstance(value, Mapping):
        if dataclasses.is_dataclass(hint):
            return _decode_fields(hint, value, where)
        if origin is not None and issubclass(origin, Mapping):
            key_of, kind = arguments
            return {key_of(k): _decode(kind, v, f"{where}.{k}") for k, v in value.items()}
    elif isinstance(value, list):
        kinds = _kinds_of_items(hint, len(value))
        if kinds is not None:
            made = (
                _decode(kind, item, f"{where}[{i}]")
                for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
            )
            return hint(*made) if hasattr(hint, "_fields") else (origin or tuple)(made)
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise RecordError(f"{where} is {value!r:.40} where a value of type {name} is expected")


def _kinds_of_items(hint: Any, count: int) -> list[Any] | None:
    """The type of each item of a list that is read as ``hint``; None if it cannot be."""
    if hasattr(hint, "_fields"):
        kinds = [*typing.get_type_hints(hint).values()]
    elif typing.get_origin(hint) in (tuple, list):
        kinds = [*typing.get_args(hint)]
        if kinds[-1] is ... or typing.get_origin(hint) is list:
            kinds = kinds[:1] * count
    else:
        return None
    return kinds if len(kinds) == count else None


_hints = functools.cache(typing.get_type_hints)


def _decode_fields(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    hints, made = _hints(kind), {}
    own = {field.metadata.get("json", field.name) for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):
        key = field.metadata.get("json", field.name)
        if field.metadata.get("inline"):
            rest: Mapping[str, Any] = values
            if not dataclasses.is_dataclass(hints[field.name]):
                rest = {name: value for name, value in values.items() if name not in own}
            made[field.name] = _decode(hints[field.name], rest, where)
        elif key in values:
            made[field.name] = _decode(hints[field.name], values[key], f"{where}.{key}")
        elif _has_no_default(field):
            raise RecordError(f"{where} has no {key!r}")
    return kind(**made)


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def to_text(record: object, schema: int | None = None) -> str:
    """The text of a file of a record."""
    content = encode(record)
    if schema is not None:
        content = {"schema": schema, **content}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_record(path: Path, record: object, *, schema: int) -> None:
    """Write a record with its schema number, whole or not at all."""
    write_text(path, to_text(record, schema))


def read_record(
    kind: type[T], path: Path, *, schema: int, migrations: Mapping[int, Migration] | None = None
) -> T:
    """Read a record of a schema up to ``schema``.

    Args:
        kind: its type.
        path: of the file.
        schema: the newest that is known.
        migrations: from each older schema whose content differs to the next one.

    Raises:
        DataError: no JSON, a later schema, or other content.
    """
    return from_content(kind, read_json(path), path, schema=schema, migrations=migrations)


def from_content(
    kind: type[T],
    content: object,
    path: Path,
    *,
    schema: int,
    migrations: Mapping[int, Migration] | None = None,
) -> T:
    """``read_record`` of a file whose JSON was read from ``path`` already."""
    found = content.get("schema", 1) if isinstance(content, dict) else None
    if not isinstance(content, dict) or type(found) is not int or found < 1:
        raise DataError(
            f"a file of a run must be as it was written; {path} is none that this project wrote. "
            "Restore it from a copy, or remove the folder that holds it to do that part again."
        )
    if found > schema:
        raise DataError(
            f"{path.name} of schema {schema} and before can be read; {path} has {found}. "
            "Use the version of cmsad-jax that wrote it, or a later one."
        )
    try:
        for number in range(found, schema):
            content = (migrations or {}).get(number, dict)(content)
        return decode(kind, content, path.name)
    except RecordError as error:
        raise DataError(
            f"a file of a run must be as it was written; {path}: {error}. "
            "Restore it from a copy, or remove the folder that holds it to do that part again."
        ) from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
