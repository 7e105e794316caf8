"""The documentation page: the OpenAPI document as plain HTML, without a script and without anything from elsewhere."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

__all__ = ["page"]

_METHODS = ("get", "post", "put", "patch", "delete", "head")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 14px/1.45 ui-monospace, monospace } pre { background: #8881; padding: .8rem; overflow-x: auto }
details { border-bottom: 1px solid #8884; padding: .5rem 0 } summary { cursor: pointer }
summary b { display: inline-block; min-width: 4.5rem } table { border-collapse: collapse }
td { padding: .1rem 1rem .1rem 0 }
"""

Schema = dict[str, Any]


def page(document: Schema) -> str:
    """The whole page, from an OpenAPI 3.1 document."""
    return "".join(_pieces(document))


def _pieces(document: Schema) -> Iterator[str]:
    title = escape(document["info"]["title"])
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    yield f'<h1>{title}</h1><p>Also as <a href="/openapi.json">openapi.json</a>.</p>'
    for path, operations in sorted(document["paths"].items()):
        for method in _METHODS:
            if method in operations:
                yield from _operation(path, method, operations[method])
    yield "<h2>Records</h2>"
    for name, schema in sorted(document.get("components", {}).get("schemas", {}).items()):
        shown = escape(json.dumps(schema, indent=2))
        yield f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary><pre>{shown}</pre></details>'


def _operation(path: str, method: str, operation: Schema) -> Iterator[str]:
    summary = escape(operation.get("summary", ""))
    yield f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> {summary}</summary>"
    yield f"<p>{escape(operation.get('description', ''))}</p>"
    rows = [
        f"<tr><td><code>{escape(one['name'])}</code><td>{one['in']}<td>{escape(one.get('description', ''))}</tr>"
        for one in operation.get("parameters", [])
    ]
    if rows:
        yield f"<table>{''.join(rows)}</table>"
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Takes <code>{escape(kind)}</code>: {_named(body.get('schema', {}))}</p>"
    for status, answer in sorted(operation.get("responses", {}).items()):
        named = "; ".join(
            f"<code>{escape(kind)}</code> {_named(body.get('schema', {}))}"
            for kind, body in answer.get("content", {}).items()
        )
        yield f"<p>{escape(status)} {escape(answer.get('description', ''))} {named}</p>"
    yield "</details>"


def _named(schema: Schema) -> str:
    """A record by its name, with the way to it; anything else as it stands."""
    reference = schema.get("$ref") or schema.get("items", {}).get("$ref")
    if reference:
        name = escape(reference.rpartition("/")[2])
        return f'<a href="#{name}"><code>{name}{"[]" if "items" in schema else ""}</code></a>'
    return f"<code>{escape(schema.get('type', '') if isinstance(schema.get('type', ''), str) else '')}</code>"
