"""JSON records as columns: the types that hold all of them without changing any.

Nothing is widened: an integer that became a float, or a number that became text, would be another example. What is no
content (``id``, ``source``, ``meta``) may change its form: it becomes text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

from curator.errors import NoColumn
from curator.sources.records import NOT_CONTENT

if TYPE_CHECKING:
    import pyarrow as pa

LARGEST = 1 << 63


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as a row: ``meta`` as its JSON, ``id`` and ``source`` as text."""
    names = {key: _text(record[key]) for key in NOT_CONTENT & record.keys() if record[key] is not None}
    return {**{key: value for key, value in record.items() if key not in NOT_CONTENT and value is not None}, **names}


def schema_of(rows: Iterable[Mapping[str, Any]]) -> pa.Schema:
    """The narrowest schema that holds every row, its fields by name.

    Raises:
        NoColumn: a field is one thing here and another there, or holds what no column can.
    """
    import pyarrow as pa

    types: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row.items():
            found = _type_of(value, name)
            types[name] = _both(types[name], found, name) if name in types else found
    return pa.schema([pa.field(name, types[name]) for name in sorted(types)])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))


def _type_of(value: Any, name: str) -> pa.DataType:
    import pyarrow as pa

    if isinstance(value, list):
        return pa.list_(reduce(lambda a, b: _both(a, _type_of(b, name), name), value, pa.null()))
    if isinstance(value, dict):
        if not value:
            raise NoColumn(field=name, reason="is an object without keys in some records")
        return pa.struct([pa.field(key, _type_of(value[key], f"{name}.{key}")) for key in sorted(value)])
    if isinstance(value, int) and not isinstance(value, bool) and not -LARGEST <= value < LARGEST:
        raise NoColumn(field=name, reason="holds an integer of more than 64 bits")
    plain = {type(None): pa.null(), bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    return plain[type(value)]


def _both(a: pa.DataType, b: pa.DataType, name: str) -> pa.DataType:
    import pyarrow as pa
    import pyarrow.types as kinds

    if a.equals(b) or kinds.is_null(b):
        return a
    if kinds.is_null(a):
        return b
    if kinds.is_list(a) and kinds.is_list(b):
        return pa.list_(_both(a.value_type, b.value_type, name))
    if kinds.is_struct(a) and kinds.is_struct(b):
        fields = {field.name: field.type for field in a}
        for field in b:
            inner = f"{name}.{field.name}"
            fields[field.name] = _both(fields[field.name], field.type, inner) if field.name in fields else field.type
        return pa.struct([pa.field(key, fields[key]) for key in sorted(fields)])
    raise NoColumn(field=name, reason=f"is {_said(a)} in some records and {_said(b)} in others")


def _said(kind: pa.DataType) -> str:
    words = {"int64": "a whole number", "double": "a number with a fraction", "string": "text", "bool": "a boolean"}
    return words.get(str(kind), "a list" if str(kind).startswith("list") else "an object")
