"""What people describe in documents, as values: dataclasses that know where they stand and that the database keeps.

`line` is where something stands in its source, from 1; 0 when that is not known. It is for messages only: the database
does not keep it, and values that differ in it are equal.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any


def line_field() -> Any:
    """The field `line` of such a dataclass."""
    return dataclasses.field(default=0, compare=False)


def to_json(value: Any) -> str:
    """A value without its name, as the database keeps it: what is as by default is left out."""
    found = _plain(value)
    del found["name"]
    return json.dumps(found, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [one for one in dataclasses.fields(value) if one.name != "line"]
        return {one.name: _plain(getattr(value, one.name)) for one in fields if getattr(value, one.name) != one.default}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
