"""Results as JSON documents: one format for everything that the commands write and print."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from thanos.system.files import write_atomically


class Document:
    """Base of dataclasses that are written as JSON objects: the fields are the keys, and one field is ``schema``."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ``schema`` first; numbers that are not finite become None."""
        values = finite(dataclasses.asdict(self))
        return {"schema": values.pop("schema"), **values}

    def to_json(self) -> str:
        """Return the text of the document."""
        return json_text(self.to_dict())

    def write(self, path: Path) -> None:
        """Write the document. A reader sees the whole old file or the whole new one."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the document from the values of :meth:`to_dict`. Unknown keys are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def json_text(values: Any) -> str:
    """Return indented JSON with a newline at its end; numbers that are not finite become null."""
    return json.dumps(finite(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """Return nested plain values. Numbers that are not finite become None, and tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
