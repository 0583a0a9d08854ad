"""/docs: the description of the API as one plain page. Nothing is loaded from elsewhere, and nothing runs in it."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from leveret.api.errors_page import INTRODUCTION, entries

_STYLE = """\
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 }
code, pre { font: 14px/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .7rem; border: 1px solid #8886; border-radius: .3rem }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0 }
.method { display: inline-block; width: 4.5rem; font-weight: bold }
"""


def operations_page(description: dict[str, Any]) -> str:
    """Every operation of an OpenAPI description, by tag."""
    info = description["info"]
    parts = [f"<h1>{_text(info['title'])} {_text(info['version'])}</h1><p>{_text(info['description'])}</p>"]
    parts.append('<p><a href="/openapi.json">openapi.json</a> &middot; <a href="/docs/errors">error codes</a></p>')
    for tag in description["tags"]:
        parts.append(f"<h2>{_text(tag['name'])}</h2><p>{_text(tag['description'])}</p>")
        for path, operations in description["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    parts.append(_operation(method, path, operation, description))
    return _page("Leveret API", parts)


def errors_page() -> str:
    """Every error code: `type` of a problem document leads to its section."""
    parts = [f"<h1>Errors</h1><p>{_text(INTRODUCTION)}</p>"]
    for entry in entries():
        told = "Read in a VM or an event." if entry.status is None else f"HTTP {entry.status}."
        parts.append(f'<h2 id="{entry.code}"><code>{entry.code}</code></h2><p>{_text(f"{entry.meaning} {told}")}</p>')
        parts.append(f"<p><b>What to do:</b> {_text(entry.hint)}</p>")
    return _page("Leveret errors", parts)


def _operation(method: str, path: str, operation: dict[str, Any], description: dict[str, Any]) -> str:
    parts = [
        f'<details id="{operation["operationId"]}"><summary><span class="method">{method.upper()}</span> '
        f"<code>{escape(path)}</code> {_text(operation['summary'])}</summary>"
    ]
    parts.extend(_parameters([_found(parameter, description) for parameter in operation["parameters"]]))
    bodies = operation.get("requestBody", {}).get("content", {})
    if bodies:
        parts.append(f"<h4>Body</h4><p>{_text(' or '.join(bodies))}</p>{_json(next(iter(bodies.values()))['example'])}")
    parts.append("<h4>Answers</h4><table>")
    for status, answer in operation["responses"].items():
        parts.append(f"<tr><td><b>{status}</b></td><td>{_text(answer['description'])}")
        contents = answer.get("content", {}).values()
        parts.extend(_example(content["example"]) for content in contents if "example" in content)
        parts.append("</td></tr>")
    parts.append("</table></details>")
    return "".join(parts)


def _parameters(parameters: list[dict[str, Any]]) -> Iterator[str]:
    if parameters:
        yield "<h4>Parameters</h4><table>"
        for parameter in parameters:
            about = parameter.get("description", "")
            schema = {key: value for key, value in parameter["schema"].items() if key not in {"title", "description"}}
            yield (
                f"<tr><td><code>{escape(parameter['name'])}</code></td><td>{parameter['in']}</td>"
                f"<td>{_text(about)}</td><td><code>{escape(json.dumps(schema))}</code></td></tr>"
            )
        yield "</table>"


def _found(item: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` leads to, or the item itself."""
    found: Any = item
    if "$ref" in item:
        found = description
        for name in item["$ref"].removeprefix("#/").split("/"):
            found = found[name]
    return dict(found)


def _example(value: Any) -> str:
    return f"<pre>{escape(value)}</pre>" if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2))}</pre>"


def _text(text: str) -> str:
    """Prose, with `code` between backquotes."""
    pieces = escape(text, quote=False).split("`")
    return "".join(f"<code>{piece}</code>" if at % 2 else piece for at, piece in enumerate(pieces))


def _page(title: str, parts: list[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )
