"""Records and JSON: what is written comes back, what is not of its type is named."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data_pipelines.faults import DataError
from experiments.process.records import (
    INLINE,
    RecordError,
    decode,
    encode,
    read_record,
    to_text,
    write_record,
)


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass(frozen=True)
class Inner:
    flag: bool
    name: str | None


@dataclasses.dataclass(frozen=True)
class Outer:
    kind: str = dataclasses.field(metadata={"json": "class"})
    inner: Inner = dataclasses.field(metadata=INLINE)
    points: tuple[Point, ...]
    by_fold: Mapping[int, tuple[float, float] | None]
    pair: tuple[str, int] = ("a", 1)
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    note: str | None = None
    anything: object = None


@dataclasses.dataclass(frozen=True)
class Loose:
    case_id: str
    values: Mapping[str, float | None] = dataclasses.field(metadata=INLINE)


OUTER = Outer(
    "x", Inner(True, None), (Point(1, 2.5),), {0: (0.5, 1.0), 3: None}, rows=[{"loss": 1.0}]
)


def test_records_come_back_as_they_were():
    values = json.loads(to_text(OUTER))
    assert values == {
        "class": "x",
        "flag": True,
        "name": None,
        "points": [[1, 2.5]],
        "by_fold": {"0": [0.5, 1.0], "3": None},
        "pair": ["a", 1],
        "rows": [{"loss": 1.0}],
    }
    assert decode(Outer, values) == OUTER
    assert decode(Outer, values | {"unknown": 1, "anything": {"deep": [1]}}) == dataclasses.replace(
        OUTER, anything={"deep": [1]}
    )


def test_inline_mappings_take_what_no_other_field_does():
    loose = Loose("a", {"dice": 0.5, "iou": None})
    assert encode(loose) == {"case_id": "a", "dice": 0.5, "iou": None}
    assert decode(Loose, encode(loose)) == loose


def test_numbers_that_are_not_finite_become_null_and_arrays_scalars_numbers():
    assert encode([float("nan"), np.inf, np.float32(0.5), np.int64(3), Path("a")]) == [
        *(None, None, 0.5, 3, "a")
    ]
    with pytest.raises(TypeError, match="no JSON for set"):
        encode({1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": 1}, r"record\.class is 1 where a value of type str is expected"),
        ({"flag": 1}, r"record\.flag is 1 where a value of type bool"),
        ({"points": [[1]]}, r"record\.points\[0\] is \[1\] where a value of type Point"),
        ({"points": [[True, 1.0]]}, r"record\.points\[0\]\[0\] is True where a value of type int"),
        ({"by_fold": {"0": 1}}, r"record\.by_fold\.0 is 1 where"),
        ({"pair": None}, r"record\.pair is None where"),
        ({"rows": [{"loss": None}]}, r"record\.rows\[0\]\.loss is None where"),
    ],
)
def test_values_of_other_types_are_named(change, message):
    with pytest.raises(RecordError, match=message):
        decode(Outer, encode(OUTER) | change)


def test_a_missing_key_is_named_unless_it_has_a_default():
    values = encode(OUTER)
    del values["points"], values["pair"]
    with pytest.raises(RecordError, match="the record has no 'points'"):
        decode(Outer, values)


def test_older_schemas_are_migrated_and_later_or_other_files_refused(tmp_path):
    file = tmp_path / "record.json"
    write_record(file, Inner(True, "a"), schema=3)
    assert json.loads(file.read_text("utf-8"))["schema"] == 3
    assert read_record(Inner, file, schema=3) == Inner(True, "a")
    with pytest.raises(DataError, match=r"record\.json of schema 2 and before can be read; .* 3\."):
        read_record(Inner, file, schema=2)
    file.write_text('{"flags": true}', encoding="utf-8")
    renamed = {1: lambda content: {"flag": content["flags"]}, 2: lambda c: c | {"name": "b"}}
    assert read_record(Inner, file, schema=3, migrations=renamed) == Inner(True, "b")
    with pytest.raises(DataError, match=r"record\.json has no 'flag'\. Restore it"):
        read_record(Inner, file, schema=3)
    for text in ("[1]", '{"schema": "new"}', '{"schema": 0}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="is none that this project wrote"):
            read_record(Inner, file, schema=3)
