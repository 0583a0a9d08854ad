"""The models as readable JSON schemas (draft 7, as AsyncAPI has it), each under its own name."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from leveret.shared.asyncapi.words import DESCRIPTIONS, FIELDS

Schema = dict[str, Any]

REF = "#/components/schemas/"
_LAW = re.compile(r" \(law \d+\)")
#: The order in which a schema is read.
_KEYS = ("title", "$ref", "description", "type", "format", "const", "enum", "pattern", "required", "properties")


def ref(model: type[BaseModel]) -> Schema:
    return {"$ref": f"{REF}{model.__name__}"}


def schemas_of(models: Iterable[type[BaseModel]]) -> dict[str, Schema]:
    """These models and all that they mention, by name, in the order of the alphabet.

    As they are read, not as they are written: what has a default need not be there, and is not when it equals it.
    """
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=REF + "{model}")
    return {name: _described(name, _readable(schema)) for name, schema in sorted(found["$defs"].items())}


def _described(name: str, schema: Schema) -> Schema:
    if name in DESCRIPTIONS:
        schema["description"] = DESCRIPTIONS[name]
    for field, words in FIELDS.get(name, {}).items():
        schema["properties"][field] = _ordered(_alone({"description": words} | schema["properties"][field]))
    return schema


def _readable(schema: Any) -> Any:
    """Without the titles that pydantic makes up, and with the shorter of two ways to say a thing."""
    if isinstance(schema, list):
        return [_readable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    short = {key: _readable(value) for key, value in schema.items() if key not in {"title", "properties", "default"}}
    if "properties" in schema:
        short["properties"] = {name: _readable(field) for name, field in schema["properties"].items()}
        if not short["properties"]:
            del short["properties"]
    if "default" in schema:
        short["default"] = schema["default"]
    if "description" in short:
        short["description"] = _LAW.sub("", " ".join(short["description"].split()))
    if short.get("additionalProperties") is True:
        del short["additionalProperties"]
    if "patternProperties" in short:
        short["additionalProperties"] = False
    return _ordered(_alone(_nullable(short)))


def _nullable(schema: Schema) -> Schema:
    """`type: [string, 'null']` for a plain type or null."""
    match schema.get("anyOf"):
        case [{"type": str()} as plain, {"type": "null"}] if not {"enum", "const"} & set(plain):
            rest = {key: value for key, value in schema.items() if key != "anyOf"}
            return {**plain, **rest, "type": [plain["type"], "null"]}
    return schema


def _alone(schema: Schema) -> Schema:
    """In draft 7 whatever stands beside a `$ref` is not looked at."""
    if "$ref" not in schema or len(schema) == 1:
        return schema
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    return rest | {"allOf": [{"$ref": schema["$ref"]}]}


def _ordered(schema: Schema) -> Schema:
    known = [key for key in _KEYS if key in schema]
    return {key: schema[key] for key in known} | {key: value for key, value in schema.items() if key not in known}
