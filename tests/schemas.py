"""The JSON schema of what `to_dict()` gives, from the dataclasses; run, it is written into the documentation."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from otel_pools._model import Advice, HealthReport, Holder, PoolHealth, PoolStats, Timing

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
WHAT = (PoolStats, Timing, HealthReport, PoolHealth, Advice, Holder)
PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def schema(kind):
    """Of one dataclass: what each field is, and what it means by the docstring."""
    hints, meanings = typing.get_type_hints(kind), meant(kind)
    properties = {
        field.name: told(hints[field.name]) | {"description": meanings[field.name]}
        for field in dataclasses.fields(kind)
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def told(hint):
    """What JSON has for a type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if dataclasses.is_dataclass(hint):
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin in {types.UnionType, typing.Union}:
        return either([told(part) for part in parts])
    if origin is tuple:
        return {"type": "array", "items": told(parts[0])}
    assert origin is Mapping, hint
    return {"type": "object"} | ({} if parts[1] is typing.Any else {"additionalProperties": told(parts[1])})


def either(parts):
    """One or the other; of two plain types, a list of both."""
    return (parts[0] | {"type": [part["type"] for part in parts]}) if all("type" in part for part in parts) else parts


def meant(kind):
    """What the docstring says of each attribute."""
    text = inspect.getdoc(kind).partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): ((?:.|\n {8})+)", text, re.MULTILINE)
    return {name: " ".join(words.split()).replace("``", "`") for name, words in found}


def document():
    """All of them in one schema: an array of pools is what `/stats` gives, and each definition is one `to_dict()`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "array",
        "items": {"$ref": "#/$defs/PoolStats"},
        "$defs": {kind.__name__: schema(kind) for kind in WHAT},
    }


def written():
    """The schema as it stands on the page: one line for each field."""
    text = json.dumps(document(), indent=2, ensure_ascii=False)
    for deep, kind in ((8, r"\w+"), (6, "required")):
        block = rf'^( {{{deep}}}"{kind}": )([{{\[]\n(?: {{{deep + 2}}}.*\n)+? {{{deep}}}[}}\]])'
        text = re.sub(block, lambda found: found[1] + flat(found[2]), text, flags=re.MULTILINE)
    return text


def flat(text):
    return json.dumps(json.loads(text), ensure_ascii=False)


def page(text):
    """The page with the schema of now."""
    return re.sub(r"(?<=```json schema\n).*?(?=```)", lambda _: written() + "\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
